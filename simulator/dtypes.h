// ACL's data types and their numbers. Rounding is to nearest, ties to even, as the card's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace sim {

enum DType : int32_t {  // aclDataType's values
  UNDEFINED = -1, FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, INT32 = 3, UINT8 = 4, INT16 = 6, UINT16 = 7, UINT32 = 8,
  INT64 = 9, UINT64 = 10, FLOAT64 = 11, BOOL = 12, STRING = 13, COMPLEX64 = 16, COMPLEX128 = 17, BFLOAT16 = 27,
  INT4 = 29,
};

size_t size_of(DType type);  // in bytes; fails on a type without a whole number of them
int64_t bits_of(DType type);  // of an element; 4 for int4, two of which are in a byte
const char *name_of(DType type);
inline bool is_float(DType t) { return t == FLOAT32 || t == FLOAT16 || t == BFLOAT16 || t == FLOAT64; }

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of view, not of size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct bfloat16 {
  uint16_t raw;
  bfloat16() = default;
  bfloat16(float value) {
    uint32_t x = bits<uint32_t>(value);
    raw = std::isnan(value) ? (x >> 16) | 0x40 : (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  }
  operator float() const { return bits<float>(uint32_t(raw) << 16); }
};

struct float16 {
  uint16_t raw;
  float16() = default;
  float16(float value) {
    uint32_t x = bits<uint32_t>(value), sign = (x >> 16) & 0x8000, magnitude = x & 0x7fffffff;
    if (magnitude > 0x7f800000) {  // not a number
      raw = sign | 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds to 65,536 or is above it
      raw = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: float32's own addition rounds at 2^-24
      raw = sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000);
    } else {
      raw = sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
    }
  }
  operator float() const {
    uint32_t sign = uint32_t(raw & 0x8000) << 16, exponent = (raw >> 10) & 31, fraction = raw & 0x3ff;
    if (exponent == 31) return bits<float>(sign | 0x7f800000 | (fraction << 13));
    if (exponent != 0) return bits<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
    float magnitude = fraction * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
};

// Calls function(T *typed) with the type that `type` says; T's value converts to and from float, double or int64_t.
template <class Function>
void with_type(DType type, void *data, Function &&function) {
  switch (type) {
    case FLOAT32: return function(static_cast<float *>(data));
    case FLOAT16: return function(static_cast<float16 *>(data));
    case BFLOAT16: return function(static_cast<bfloat16 *>(data));
    case FLOAT64: return function(static_cast<double *>(data));
    case INT8: return function(static_cast<int8_t *>(data));
    case UINT8: return function(static_cast<uint8_t *>(data));
    case BOOL: return function(static_cast<bool *>(data));
    case INT16: return function(static_cast<int16_t *>(data));
    case UINT16: return function(static_cast<uint16_t *>(data));
    case INT32: return function(static_cast<int32_t *>(data));
    case UINT32: return function(static_cast<uint32_t *>(data));
    case INT64: return function(static_cast<int64_t *>(data));
    case UINT64: return function(static_cast<uint64_t *>(data));
    default: size_of(STRING);  // fails: no such numbers
  }
}

}  // namespace sim
