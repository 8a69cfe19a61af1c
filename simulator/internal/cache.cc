// ReshapeAndCache.
#include <algorithm>

#include "kernel.h"

namespace sim {
namespace {

// Writes the key and value of each token, (tokens, heads · D) or (batch, length, heads · D), to its slot of the caches
// (blocks, block size, heads, D), in place; a negative slot is passed over.
void reshape_and_cache(Op &op) {
  op.names = {"key", "value", "key_cache", "value_cache", "slot_mapping"};
  op.types(0, {FLOAT16, BFLOAT16, INT8, UINT8});
  op.rank(0, 2, 3);
  op.types(4, {INT32});
  op.rank(4, 1, 1);
  const int64_t tokens = op[4].dim(0);
  op.require(static_cast<bool>(op[1]) == static_cast<bool>(op[3]), "value and value cache must both be given or neither");
  for (int i : {0, 1}) {
    if (!op[i]) continue;
    const Tensor &rows = op[i], &cache = op[2 + i];
    op.rank(2 + i, 4, 4);
    op.require(rows.type == op[0].type && cache.type == op[0].type, "key, value and the caches differ in dtype");
    op.require(rows.size() == tokens * rows.dim(-1), "there must be a slot for each token");
    op.require(rows.dim(-1) == cache.dim(2) * cache.dim(3), "a token must have as many numbers as a slot of the cache");
    op.require(tokens <= cache.dim(0) * cache.dim(1), "there are more tokens than slots in the cache");
  }
  op.run([=](const Tensors &t) {
    const auto slots = read<int64_t>(t[4]);
    for (int i : {0, 1}) {
      if (!t[i]) continue;
      const int64_t width = t[i].dim(-1), room = t[2 + i].dim(0) * t[2 + i].dim(1);
      const Tensor rows = make_tensor(t[i].type, {tokens, width}, t[i].data);
      const Tensor cache = make_tensor(t[i].type, {room, width}, t[2 + i].data);
      for (int64_t token = 0; token < tokens; ++token) {
        if (slots[token] < 0) continue;
        if (slots[token] >= room) fail("slot %ld is outside the cache's %ld", long(slots[token]), long(room));
        copy(slice(cache, 0, slots[token], 1), slice(rows, 0, token, 1));
      }
    }
  });
}

}  // namespace
}  // namespace sim

namespace mindspore::internal {
InternalOpPtr CreateReshapeAndCacheOp(const InputsImmutableInfoList &inputs, const OutputsImmutableInfoList &outputs,
                                      const std::string &name) {
  return sim::make_internal(inputs, outputs, name, sim::reshape_and_cache);
}
}  // namespace mindspore::internal
