// What MindSpore's Custom operator calls: inputs, then outputs, with their shapes and the names of their dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "product.h"

struct Arguments {
    void** data;
    int* dimensions;
    int64_t** shapes;
    const char** dtypes;

    float* floats(int i) const { return static_cast<float*>(data[i]); }
    int32_t* ints(int i) const { return static_cast<int32_t*>(data[i]); }
    float scalar(int i) const { return *floats(i); }
    int64_t size(int i, int axis) const { return shapes[i][axis]; }
    // Python gives a float32 tensor of shape (1, 1, 1) where there is nothing.
    bool absent(int i) const {
        return dimensions[i] == 3 && shapes[i][0] * shapes[i][1] * shapes[i][2] == 1;
    }
    int64_t elements(int i) const {
        int64_t result = 1;
        for (int axis = 0; axis < dimensions[i]; axis++) result *= shapes[i][axis];
        return result;
    }
    Type type(int i) const { return std::strstr(dtypes[i], "bfloat16") ? Type::bfloat16 : Type::float32; }
};

#define OPERATOR(name)                                                                                             \
    static int name##_of(const Arguments& in, int count);                                                          \
    extern "C" __attribute__((visibility("default"))) int name(int count, void** data, int* dimensions,            \
                                                               int64_t** shapes, const char** dtypes, void*, void*) { \
        return name##_of({data, dimensions, shapes, dtypes}, count);                                               \
    }                                                                                                              \
    static int name##_of([[maybe_unused]] const Arguments& in, [[maybe_unused]] int count)
