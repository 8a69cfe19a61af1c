// Asks a library of MindSpore's internal kernels what it takes: a question a line, 1 or 0 and bytes of workspace a line.
//
//   dtypes KERNEL COUNT INPUT… OUTPUT…          (numbers of mindspore::internal::DataType; COUNT of them are inputs)
//   paged RANK HEADS KV_HEADS DIM BLOCK HOST [TYPE WIDTH]   (rank of the query; whether the lengths are on the host;
//                                                            bfloat16; 4 blocks a sequence)
//   flash LAYOUT SPARSE PRE NEXT DIM MASK LENGTH KEYS   (MASK: a data type)
//   cache KEY_RANK CACHE_RANK TOKENS            (into 8 blocks of 16)
//   end
#include <iostream>
#include <sstream>

#include "internal.h"

using namespace mindspore::internal;

namespace {

constexpr int64_t BATCH = 2;

template <class List>
List infos(std::initializer_list<int> types) {
  List list;
  for (int type : types) list.emplace_back(static_cast<DataType>(type), kFormatND);
  return list;
}

size_t workspace = 0;  // of the last kernel that was asked about

bool takes(InternalOpPtr op, const ShapeInfoList &inputs, const ShapeInfoList &outputs) {
  if (op == nullptr || op->Init() != kInternalOk || op->UpdateShape(inputs, outputs) != kInternalOk) return false;
  std::vector<char> host(op->GetTilingSize() + 4096);
  HostRunInfoPtr info;
  if (op->Tiling(host.data(), &info) != kInternalOk || info == nullptr) return false;
  for (size_t bytes : op->GetWorkspaceSize()) workspace += bytes;
  return true;
}

bool dtypes(std::istream &in) {
  std::string name;
  size_t count;
  int type;
  in >> name >> count;
  InputDataTypes inputs, outputs;
  while (in >> type) (inputs.size() < count ? inputs : outputs).push_back(static_cast<DataType>(type));
  return IsInternalKernelDtypesSupported(name, inputs, outputs);
}

bool paged(std::istream &in) {
  int64_t rank, heads, kv_heads, dim, block, host;
  in >> rank >> heads >> kv_heads >> dim >> block >> host;
  PagedAttentionParam param;
  param.head_num = heads;
  param.kv_head_num = kv_heads;
  param.tor = 0.1f;
  if (host) param.kv_seq_len = {5, 7};
  int half = kTypeBF16;
  const int none = kTypeNone;
  int64_t width = 4;
  if (int type; in >> type >> width) half = type;
  const ShapeInfo query = rank == 2 ? ShapeInfo{BATCH, heads * dim} : ShapeInfo{BATCH, 1, heads * dim};
  const ShapeInfo cache = {8, block, kv_heads, dim};
  return takes(CreatePagedAttentionOp(infos<InputsImmutableInfoList>({half, half, half, kTypeInt32, kTypeInt32, none, none,
                                                                      none, none}),
                                      infos<OutputsImmutableInfoList>({half}), param, kInternalPagedAttentionOpName),
               {query, cache, cache, {BATCH, width}, {BATCH}, {}, {}, {}, {}}, {query});
}

bool flash(std::istream &in) {
  int64_t layout, sparse, pre, next, dim, mask, length, keys;
  in >> layout >> sparse >> pre >> next >> dim >> mask >> length >> keys;
  constexpr int64_t HEADS = 4;
  FlashAttentionScoreParam param;
  param.head_num = HEADS;
  param.tor = 0.1f;
  param.input_layout = layout;
  param.sparse_mode = sparse;
  param.pre_tokens = pre;
  param.next_tokens = next;
  param.mask_dtype = mask;
  auto shape = [&](int64_t size) {
    if (layout == FlashAttentionScoreParam::BNSD) return ShapeInfo{BATCH, HEADS, size, dim};
    if (layout == FlashAttentionScoreParam::BSND) return ShapeInfo{BATCH, size, HEADS, dim};
    return ShapeInfo{BATCH, size, HEADS * dim};
  };
  const int half = kTypeBF16;
  return takes(CreateFlashAttentionScoreOp(
                   infos<InputsImmutableInfoList>({half, half, half, kTypeNone, static_cast<int>(mask)}),
                   infos<OutputsImmutableInfoList>({half}), param, kInternalFlashAttentionScoreOpName),
               {shape(length), shape(keys), shape(keys), {}, {}}, {shape(length)});
}

bool cache(std::istream &in) {
  int64_t key_rank, cache_rank, tokens;
  in >> key_rank >> cache_rank >> tokens;
  const ShapeInfo key = key_rank == 2 ? ShapeInfo{tokens, 64} : key_rank == 3 ? ShapeInfo{1, tokens, 64}
                                                                             : ShapeInfo{1, tokens, 4, 16};
  const ShapeInfo cache = cache_rank == 4 ? ShapeInfo{8, 16, 4, 16} : ShapeInfo{128, 64};
  const int half = kTypeBF16;
  return takes(CreateReshapeAndCacheOp(infos<InputsImmutableInfoList>({half, half, half, half, kTypeInt32}), {},
                                       kInternalReshapeAndCacheOpName),
               {key, key, cache, cache, {tokens}}, {});
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line) && line != "end";) {
    std::istringstream in(line);
    std::string question;
    in >> question;
    workspace = 0;
    bool yes = question == "dtypes" ? dtypes(in) : question == "paged" ? paged(in) : question == "flash" ? flash(in)
                                                                                                      : cache(in);
    std::cout << "answer " << yes << " " << workspace << std::endl;
  }
  _Exit(0);  // the wheel's library needs a card to be put away
}
