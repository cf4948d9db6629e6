// A GPU for tests: runs kernels on the host, one block after the other.
//
// Each thread of a block is a fiber, so a barrier is a plain switch between stacks, and a barrier
// that some thread never reaches is noticed instead of hanging. The fibers run in a fixed order.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
// One block runs at a time, on one thread of the host.
#define __shared__ static
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

namespace emulator {

struct Dim3 {
    unsigned x, y, z;
};

struct Barrier {
    unsigned members = 0, arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    Dim3 index;
    bool done;
};

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned WARP = 32;

inline Dim3 block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline Barrier block, warps[32];
inline uint64_t lanes[32][WARP];
inline unsigned progress;  // fibers that ended or passed a barrier since the scheduler looked
inline std::function<void()> body;

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    ++progress;
    while (barrier.generation == generation) {
        swapcontext(&current->context, &scheduler);
    }
}

inline void block_barrier() { wait(block); }

template <typename T> T shuffle_xor(T value, int distance) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a lane's value");
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    memcpy(&lanes[warp][lane], &value, sizeof(T));
    wait(warps[warp]);
    memcpy(&value, &lanes[warp][lane ^ distance], sizeof(T));
    wait(warps[warp]);  // nobody writes again before everybody has read
    return value;
}

inline void enter() {
    body();
    current->done = true;
    ++progress;
    swapcontext(&current->context, &scheduler);
}

// Runs `kernel` for every thread of the grid.
inline void run(Dim3 grid, Dim3 threads, std::function<void()> kernel) {
    static std::vector<char> stacks;
    stacks.resize(threads.x * STACK_BYTES);
    fibers.resize(threads.x);
    body = std::move(kernel);
    grid_size = grid;
    block_size = threads;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            block_index = {x, y, 0};
            block = {threads.x};
            for (unsigned warp = 0; warp < threads.x / WARP; ++warp) {
                warps[warp] = {WARP};
            }
            for (unsigned i = 0; i < threads.x; ++i) {
                Fiber& fiber = fibers[i];
                fiber.index = {i, 0, 0};
                fiber.done = false;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = stacks.data() + i * STACK_BYTES;
                fiber.context.uc_stack.ss_size = STACK_BYTES;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
            }
            do {
                progress = 0;
                for (Fiber& fiber : fibers) {
                    if (!fiber.done) {
                        current = &fiber;
                        swapcontext(&scheduler, &fiber.context);
                    }
                }
            } while (progress != 0);
            for (const Fiber& fiber : fibers) {
                if (!fiber.done) {
                    fprintf(stderr,
                            "emulator: block (%u, %u): not every thread reaches a barrier\n", x, y);
                    abort();
                }
            }
        }
    }
}

// To nearest, ties to even; as the GPU does, and unlike the host's own types also where the
// compiler has none.
inline float bf16_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (isnan(x)) {
        return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    float x;
    if (exponent == 31) {
        x = mantissa ? NAN : INFINITY;
    } else if (exponent == 0) {
        x = ldexpf(static_cast<float>(mantissa), -24);
    } else {
        x = ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
    }
    return bits & 0x8000 ? -x : x;
}

inline uint16_t float_to_f16(float x) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x)) {
        return 0x7fff;
    }
    x = fabsf(x);
    if (x >= 65520.0f) {  // half way from the largest number to the next
        return sign | 0x7c00;
    }
    int exponent;
    frexpf(x, &exponent);
    // The spacing of halves here; 0 and the numbers below 2^-14 share the smallest one.
    const int unit = x < 0x1p-14f ? -24 : exponent - 11;
    const int units = static_cast<int>(rintf(ldexpf(x, -unit)));
    // A mantissa that rounds up to 2048 carries into the exponent by itself.
    return sign | static_cast<uint16_t>(unit == -24 ? units : units + ((unit + 24) << 10));
}

}  // namespace emulator
