// Runs the CUDA sources on a CPU, for tests: correctness, not speed.
//
// Every CUDA thread of a block is a fiber on one OS thread. A barrier, a shuffle or a matrix product switches to the
// next fiber; blocks run one after another. With schedule 0 warps and lanes take turns in order. Any other schedule
// picks a warp at random and lets it run as far ahead as the block's barriers allow, with its lanes in random order:
// a missing barrier then shows as a changed result. Dynamic shared memory starts as NaN in every block. ldmatrix reads a
// lane's row when that lane comes to it, so that what other lanes store needs a barrier before it.
//
// A launch that no GPU takes is refused with CUDA's own error, for the smallest limits of sm_80 to sm_120. What would be
// undefined there (a write behind the dynamic shared memory, a row of ldmatrix that is not aligned) ends the process.
//
// What it cannot show: orderings within one fiber's run (weak memory, asynchronous copies), and time.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr int EXCHANGED_BYTES = 64;

enum class Wait { NOTHING, WARP, BLOCK };

#if defined(__x86_64__)

using Context = void *;

extern "C" void rwkv_shim_switch(void **save_stack_pointer, void *stack_pointer);

inline void switch_context(Context &from, Context &to) {
    rwkv_shim_switch(&from, to);
}

inline Context make_context(char *stack, void (*entry)()) {
    auto *top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t(63)) - 8;
    *--top = nullptr;  // where entry would return to; also keeps the stack aligned as at a call
    *--top = reinterpret_cast<void *>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    return top;
}

#else

using Context = std::shared_ptr<ucontext_t>;

inline void switch_context(Context &from, Context &to) {
    if (!from) from = std::make_shared<ucontext_t>();
    swapcontext(from.get(), to.get());
}

inline Context make_context(char *stack, void (*entry)()) {
    auto context = std::make_shared<ucontext_t>();
    getcontext(context.get());
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK_BYTES;
    makecontext(context.get(), entry, 0);
    return context;
}

#endif

struct Fiber {
    Context context;
    dim3 index;
    int linear;          // index in the block
    Wait wait;
    unsigned exchanges;  // how many it took part in: consecutive ones use different slots
    bool is_done;
};

using Slots = char[WARP][EXCHANGED_BYTES];

struct Block {
    std::vector<Fiber> fibers;
    Context scheduler;
    int current = 0;
    dim3 index, size, grid;
    const std::function<void()> *body = nullptr;
    char *dynamic_memory = nullptr;
    std::vector<char> slots;  // two Slots a warp

    Fiber &fiber() {
        return fibers[current];
    }
};

inline thread_local Block *block = nullptr;
inline std::atomic<uint32_t> schedule{0};

inline void wait_for(Wait what) {
    Fiber &fiber = block->fiber();
    fiber.wait = what;
    switch_context(fiber.context, block->scheduler);
}

inline void run_fiber() {
    (*block->body)();
    block->fiber().is_done = true;
    wait_for(Wait::NOTHING);
    abort();
}

inline int lane() {
    return block->fiber().linear % WARP;
}

// Gives `value` to the other lanes of the warp and returns all their values. Two slots are enough: no lane can be two
// exchanges ahead of another.
template <typename T>
const Slots &exchange(const T &value) {
    static_assert(sizeof(T) <= EXCHANGED_BYTES, "a slot holds the value");
    Fiber &fiber = block->fiber();
    const int slot = fiber.linear / WARP * 2 + (fiber.exchanges++ & 1);
    auto &slots = reinterpret_cast<Slots *>(block->slots.data())[slot];
    memcpy(slots[lane()], &value, sizeof(T));
    wait_for(Wait::WARP);
    return slots;
}

template <typename T>
T received(const Slots &slots, int from) {
    T value;
    memcpy(&value, slots[from], sizeof(T));
    return value;
}

// Runs the lanes of a warp until all of them are done or wait for the block. Returns whether any could run.
inline bool run_warp(Block &b, int warp, std::vector<int> &lanes, std::mt19937 &random, bool shuffled) {
    const int begin = warp * WARP, end = std::min<int>(begin + WARP, b.fibers.size());
    bool progress = false;
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        if (shuffled) std::shuffle(lanes.begin(), lanes.end(), random);
        for (int lane : lanes) {
            const int i = begin + lane;
            if (i >= end || b.fibers[i].is_done || b.fibers[i].wait != Wait::NOTHING) continue;
            b.current = i;
            switch_context(b.scheduler, b.fibers[i].context);
            goes_on = progress = true;
        }
        int alive = 0, waiting = 0;
        for (int i = begin; i < end; ++i) {
            alive += !b.fibers[i].is_done;
            waiting += !b.fibers[i].is_done && b.fibers[i].wait == Wait::WARP;
        }
        if (alive && alive == waiting) {
            for (int i = begin; i < end; ++i) b.fibers[i].wait = Wait::NOTHING;
            goes_on = true;
        }
    }
    return progress;
}

inline void run_block(Block &b, char *stacks, std::mt19937 &random) {
    block = &b;
    const int count = b.fibers.size(), warps = (count + WARP - 1) / WARP;
    for (int i = 0; i < count; ++i) {
        const dim3 index(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
        b.fibers[i] = {make_context(stacks + i * STACK_BYTES, run_fiber), index, i, Wait::NOTHING, 0, false};
    }
    std::vector<int> order(warps), lanes(WARP);
    for (int i = 0; i < warps; ++i) order[i] = i;
    for (int i = 0; i < WARP; ++i) lanes[i] = i;
    const bool shuffled = schedule != 0;
    const auto all = [&](auto holds) { return std::all_of(b.fibers.begin(), b.fibers.end(), holds); };
    while (!all([](const Fiber &f) { return f.is_done; })) {
        if (shuffled) std::shuffle(order.begin(), order.end(), random);
        bool progress = false;
        for (int warp : order) progress |= run_warp(b, warp, lanes, random, shuffled);
        if (all([](const Fiber &f) { return f.is_done || f.wait == Wait::BLOCK; })) {
            for (Fiber &fiber : b.fibers) fiber.wait = Wait::NOTHING;
        } else if (!progress) {
            fprintf(stderr, "deadlock: threads of block %u,%u,%u wait at different barriers\n", b.index.x, b.index.y,
                    b.index.z);
            abort();
        }
    }
    block = nullptr;
}

using Memory = std::unique_ptr<char, void (*)(void *)>;

constexpr int UNTOUCHED = 0xff;  // bytes of dynamic memory that nothing was written to: NaN as floats

inline void fail(const char *what) {
    fprintf(stderr, "%s, block %u,%u,%u\n", what, block->index.x, block->index.y, block->index.z);
    abort();
}

// cudaErrorInvalidConfiguration or cudaErrorInvalidValue, as an int; 0 for a launch that every GPU
// takes whose blocks may have so many bytes of shared memory.
inline int refusal(const dim3 &grid, const dim3 &size, size_t dynamic_bytes, size_t most_bytes) {
    constexpr uint64_t MOST_THREADS = 1024, MOST_ROWS = 65535, MOST_BLOCKS = 2147483647;
    const uint64_t threads = uint64_t(size.x) * size.y * size.z;
    const bool is_grid_small = grid.x <= MOST_BLOCKS && grid.y <= MOST_ROWS && grid.z <= MOST_ROWS;
    const bool has_blocks = grid.x && grid.y && grid.z && is_grid_small;
    if (!has_blocks || !threads || threads > MOST_THREADS) return 9;
    return dynamic_bytes > most_bytes ? 1 : 0;
}

// RWKV_HOST_THREADS OS threads run blocks, one by default.
inline void launch(dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()> &body) {
    const char *wanted = getenv("RWKV_HOST_THREADS");
    const int threads = wanted ? std::max(1, atoi(wanted)) : 1;
    const unsigned blocks = grid.x * grid.y * grid.z, count = size.x * size.y * size.z;
    std::atomic<unsigned> next{0};
    const auto work = [&](int thread) {
        Block b;
        b.fibers.resize(count);
        b.slots.resize((count + WARP - 1) / WARP * 2 * sizeof(Slots));
        b.size = size;
        b.grid = grid;
        b.body = &body;
        const auto allocate = [](size_t alignment, size_t bytes) {
            return Memory(static_cast<char *>(aligned_alloc(alignment, bytes)), free);
        };
        const Memory stacks = allocate(64, STACK_BYTES * count);
        const size_t rounded = (dynamic_bytes + 1024) / 1024 * 1024;
        const Memory dynamic = allocate(1024, rounded);
        b.dynamic_memory = dynamic.get();
        std::mt19937 random(schedule + thread);
        for (unsigned i; (i = next++) < blocks;) {
            memset(dynamic.get(), UNTOUCHED, rounded);
            b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
            run_block(b, stacks.get(), random);
            const auto is_untouched = [](char byte) { return static_cast<unsigned char>(byte) == UNTOUCHED; };
            if (!std::all_of(dynamic.get() + dynamic_bytes, dynamic.get() + rounded, is_untouched)) {
                block = &b;
                fail("a write behind the dynamic shared memory");
            }
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
    work(0);
    for (std::thread &other : others) other.join();
}

}  // namespace shim

#define threadIdx (shim::block->fiber().index)
#define blockIdx (shim::block->index)
#define blockDim (shim::block->size)
#define gridDim (shim::block->grid)

inline void __syncthreads() {
    shim::wait_for(shim::Wait::BLOCK);
}

inline void __syncwarp(unsigned = 0xffffffffu) {
    shim::wait_for(shim::Wait::WARP);
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return shim::received<T>(shim::exchange(value), from & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::received<T>(shim::exchange(value), shim::lane() ^ mask);
}

// Bit l: the predicate of lane l.
inline uint32_t __ballot_sync(unsigned, bool predicate) {
    const auto &slots = shim::exchange(predicate);
    uint32_t ballot = 0;
    for (int lane = 0; lane < shim::WARP; ++lane) ballot |= uint32_t(shim::received<bool>(slots, lane)) << lane;
    return ballot;
}

inline int __clz(uint32_t x) {
    return x ? __builtin_clz(x) : 32;
}

inline int __ffs(uint32_t x) {
    return __builtin_ffs(x);
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

struct __attribute__((aligned(16))) float4 {
    float x, y, z, w;
};

struct __attribute__((aligned(16))) uint4 {
    uint32_t x, y, z, w;
};

namespace rwkv {

struct bf16 {
    uint16_t bits;
};
using half = _Float16;

inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float to_float(half x) {
    return static_cast<float>(x);
}

// x off by as many units in its last place as the GPU's instruction may be, up or down by the bits of x; subnormals are 0.
inline float off_by_ulps(float x, int ulps) {
    if (x < 0x1p-126f || isinf(x)) return x < 0x1p-126f ? 0.0f : x;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const bool is_up = bits * 2654435761u >> 31;
    bits += is_up ? ulps : -ulps;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

inline float exp2_approx(float x) {
    return off_by_ulps(exp2f(x), 2);
}

inline float reciprocal_approx(float x) {
    return off_by_ulps(1.0f / x, 1);
}

inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline half to_half(float x) {
    return static_cast<half>(x);
}

inline uint32_t pack2(bf16 low, bf16 high) {
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// Lane l of the fragments: g = l / 4, t = l % 4. A [16,16]: a[i] holds rows g + 8 (i % 2), columns 2 t + 8 (i / 2) and
// the next. B [16,8]: b[i] holds rows 2 t + 8 i and the next, column g. C [16,8]: c[i] is row g + 8 (i / 2), column
// 2 t + i % 2.
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Words {
        uint32_t word[6];
    };
    const auto &slots = shim::exchange(Words{{a[0], a[1], a[2], a[3], b[0], b[1]}});
    const int g = shim::lane() / 4, t = shim::lane() % 4;
    const auto element = [&](int lane, int word, int upper) {
        uint32_t bits;
        memcpy(&bits, slots[lane] + 4 * word, 4);
        return to_float(bf16{static_cast<uint16_t>(upper ? bits >> 16 : bits)});
    };
    for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2, upper = k % 2, second = k / 8;
        for (int i = 0; i < 4; ++i) {
            const float row = element(g * 4 + owner, second * 2 + i / 2, upper);
            c[i] += row * element((2 * t + i % 2) * 4 + owner, 4 + second, upper);
        }
    }
}

// Four 8 x 8 matrices of bf16, whose rows lane 8 m + i points to: matrix m, row i. Lane l receives of each matrix row
// l / 4, columns 2 (l % 4) and the next; transposed, column l / 4, rows 2 (l % 4) and the next.
inline void load_matrices(uint32_t (&to)[4], const bf16 *from, bool transposed) {
    struct Row {
        bf16 at[8];
    };
    if (reinterpret_cast<uintptr_t>(from) % sizeof(Row)) shim::fail("a row of ldmatrix that is not aligned");
    Row own;
    memcpy(&own, from, sizeof(own));
    const auto &slots = shim::exchange(own);
    const int g = shim::lane() / 4, t = shim::lane() % 4;
    const auto row = [&](int m, int i) { return shim::received<Row>(slots, 8 * m + i); };
    for (int m = 0; m < 4; ++m) {
        to[m] = transposed ? pack2(row(m, 2 * t).at[g], row(m, 2 * t + 1).at[g])
                           : pack2(row(m, g).at[2 * t], row(m, g).at[2 * t + 1]);
    }
}

inline void ldmatrix(uint32_t (&to)[4], const bf16 *row) {
    load_matrices(to, row, false);
}

inline void ldmatrix_transposed(uint32_t (&to)[4], const bf16 *row) {
    load_matrices(to, row, true);
}

template <typename T>
T *dynamic_memory() {
    return reinterpret_cast<T *>(shim::block->dynamic_memory);
}

template <size_t most_bytes = MOST_SHARED_BYTES, typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, void *,
               Arguments... arguments) {
    if (const int error = shim::refusal(grid, block, dynamic_bytes, most_bytes)) return RWKV_CUDA_ERROR + error;
    shim::launch(grid, block, dynamic_bytes, [=] { kernel(arguments...); });
    return RWKV_OK;
}

// As sm_90 and sm_100 do.
inline bool holds_blocks(size_t dynamic_bytes, int blocks) {
    return blocks * (dynamic_bytes + (1 << 10)) <= 228 << 10;
}

}  // namespace rwkv
