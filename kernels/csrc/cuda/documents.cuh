// Where documents begin among the steps that a kernel takes together, at most 32. The state before a start is zero.
#pragma once

#include "device.cuh"

namespace rwkv {

struct Documents {
    uint32_t starts;  // bit t: step t is the first of its document

    __device__ __forceinline__ bool is_start(int step) const {
        return starts >> step & 1;
    }

    // body(step) for each step that begins a document.
    template <typename Body>
    __device__ __forceinline__ void for_starts(const Body &body) const {
#pragma unroll 1
        for (uint32_t left = starts; left; left &= left - 1) body(__ffs(left) - 1);
    }

    // The first step of this step's document; -1 where that began before these steps.
    __device__ __forceinline__ int first_step(int step) const {
        return 31 - __clz(starts & ((2u << step) - 1));
    }

    // Steps of this step's document from it on; 32 where no other one begins.
    __device__ __forceinline__ int steps_left(int step) const {
        const uint32_t later = starts >> step >> 1;
        return later ? __ffs(later) : 32;
    }

    // Whether a step reads what an earlier one, or the same, has written.
    __device__ __forceinline__ bool joins(int step, int earlier) const {
        return earlier >= first_step(step);
    }

    __device__ __forceinline__ bool reads_first_state(int step) const {
        return first_step(step) < 0;
    }

    // Whether what a step writes is in the state after the last one.
    __device__ __forceinline__ bool reaches_last_state(int step) const {
        return step >= first_step(31);
    }
};

// This block's row of starts [B,T], or null.
__device__ __forceinline__ const uint8_t *row_of_starts(const uint8_t *starts, int64_t time, int heads) {
    return starts ? starts + blockIdx.x / heads * time : nullptr;
}

// Whether a document begins at this lane's one of `steps` steps from `first` on; none does outside 0 .. time - 1.
__device__ __forceinline__ bool load_start(const uint8_t *row, int64_t time, int64_t first, int steps) {
    const int lane = threadIdx.x % 32;
    return row && lane < steps && first >= 0 && first + lane < time && row[first + lane];
}

// From each lane's load_start, for all of them.
__device__ __forceinline__ Documents share_starts(bool is_start) {
    return {__ballot_sync(0xffffffffu, is_start)};
}

}  // namespace rwkv
