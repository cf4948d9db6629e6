// archs: 80 86 89 90 100 120 +80
// Moving token rows to and from expert order.
//
// All of it is bound by memory: a row is read or written once, in the widest unit that its length
// and address allow. Rows and slots out of range are treated like -1, never followed: on a GPU
// nobody has looked at the maps before the launch.
#include "base.cuh"

#include <stddef.h>

// Dtype of topk_weights, as rust/cuda/src/permute.rs numbers them.
enum WeightsDtype { WEIGHTS_F32 = 0, WEIGHTS_F64 = 1, WEIGHTS_F16 = 2, WEIGHTS_BF16 = 3 };

struct PermuteRows {
    const uint8_t* x;
    const int32_t* slot_of_row;
    uint8_t* out;
    int64_t row_bytes;
    int32_t slots;
    int32_t top_k;
    int32_t unit_bytes;
    int32_t padding;
};
static_assert(sizeof(PermuteRows) == 48 && offsetof(PermuteRows, row_bytes) == 24 &&
                  offsetof(PermuteRows, slots) == 32 && offsetof(PermuteRows, top_k) == 36 &&
                  offsetof(PermuteRows, unit_bytes) == 40,
              "rust/cuda/src/permute.rs has the same");

struct Unpermute {
    const void* y;
    const int32_t* row_of_slot;
    const void* topk_weights;
    void* out;
    int64_t hidden;
    int32_t rows;
    int32_t top_k;
    int32_t weights_dtype;
    int32_t vectorised;
};
static_assert(sizeof(Unpermute) == 56 && offsetof(Unpermute, topk_weights) == 16 &&
                  offsetof(Unpermute, hidden) == 32 && offsetof(Unpermute, rows) == 40 &&
                  offsetof(Unpermute, top_k) == 44 && offsetof(Unpermute, weights_dtype) == 48 &&
                  offsetof(Unpermute, vectorised) == 52,
              "rust/cuda/src/permute.rs has the same");

struct UnpermuteBackward {
    const void* grad;
    const void* y;
    const int32_t* slot_of_row;
    const int32_t* row_of_slot;
    const void* topk_weights;
    void* dy;
    void* dw;
    int64_t hidden;
    int32_t slots;
    int32_t top_k;
    int32_t weights_dtype;
    int32_t vectorised;
};
static_assert(sizeof(UnpermuteBackward) == 80 && offsetof(UnpermuteBackward, dw) == 48 &&
                  offsetof(UnpermuteBackward, hidden) == 56 &&
                  offsetof(UnpermuteBackward, slots) == 64 &&
                  offsetof(UnpermuteBackward, top_k) == 68 &&
                  offsetof(UnpermuteBackward, weights_dtype) == 72 &&
                  offsetof(UnpermuteBackward, vectorised) == 76,
              "rust/cuda/src/permute.rs has the same");

// topk_weights[slot]; 1 without weights.
template <typename Acc>
DEVICE Acc weight_of(const void* topk_weights, int32_t weights_dtype, int64_t slot) {
    if (topk_weights == nullptr) {
        return 1;
    }
    switch (weights_dtype) {
    case WEIGHTS_F64:
        return static_cast<Acc>(static_cast<const double*>(topk_weights)[slot]);
    case WEIGHTS_F16:
        return widen(static_cast<const F16*>(topk_weights)[slot]);
    case WEIGHTS_BF16:
        return widen(static_cast<const Bf16*>(topk_weights)[slot]);
    default:
        return static_cast<const float*>(topk_weights)[slot];
    }
}

template <int UNIT_BYTES>
DEVICE void move_row(const uint8_t* from, uint8_t* to, int64_t row_bytes, bool live) {
    using Unit = Vector<uint8_t, UNIT_BYTES>;
    const Unit* src = reinterpret_cast<const Unit*>(from);
    Unit* dst = reinterpret_cast<Unit*>(to);
    const int64_t units = row_bytes / UNIT_BYTES;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    for (; i < units; i += stride) {
        dst[i] = live ? src[i] : Unit{};
    }
}

// out[r, :] = x[slot_of_row[r] / top_k, :], or zero where slot_of_row[r] is no slot
//
// x            [T, row_bytes]      any type; addresses and row_bytes are multiples of unit_bytes
// slot_of_row  [slots]             slots = T * K; -1 past the last routed row
// out          [slots, row_bytes]
//
// A block per output row, so that the index is read once per block; several blocks share a row
// (blockIdx.y) where there are too few rows to fill the GPU. unit_bytes is the same for the whole
// grid, so the switch costs nothing beside the loads.
extern "C" __global__ void __launch_bounds__(256) permute_rows(const PermuteRows p) {
    const int64_t row = blockIdx.x;
    const int32_t slot = p.slot_of_row[row];
    const bool live = slot >= 0 && slot < p.slots;
    const uint8_t* from = live ? p.x + slot / p.top_k * p.row_bytes : p.x;
    uint8_t* to = p.out + row * p.row_bytes;
    switch (p.unit_bytes) {
    case 16:
        return move_row<16>(from, to, p.row_bytes, live);
    case 8:
        return move_row<8>(from, to, p.row_bytes, live);
    case 4:
        return move_row<4>(from, to, p.row_bytes, live);
    case 2:
        return move_row<2>(from, to, p.row_bytes, live);
    default:
        return move_row<1>(from, to, p.row_bytes, live);
    }
}

template <typename T, int N> DEVICE void combine_rows(const Unpermute& p) {
    using Acc = Accumulator<T>;
    const int64_t token = blockIdx.x;
    const int64_t first_slot = token * p.top_k;
    const Vector<T, N>* y = static_cast<const Vector<T, N>*>(p.y);
    Vector<T, N>* out = static_cast<Vector<T, N>*>(p.out);
    const int64_t width = p.hidden / N;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    for (; i < width; i += stride) {
        Acc sum[N] = {};
        for (int32_t k = 0; k < p.top_k; ++k) {
            const int32_t row = p.row_of_slot[first_slot + k];
            // Skipped, not multiplied by zero: nothing says that the row beyond is finite.
            if (row < 0 || row >= p.rows) {
                continue;
            }
            const Acc weight = weight_of<Acc>(p.topk_weights, p.weights_dtype, first_slot + k);
            const Vector<T, N> values = y[row * width + i];
            for (int n = 0; n < N; ++n) {
                sum[n] = multiply_add(weight, widen(values.at[n]), sum[n]);
            }
        }
        Vector<T, N> rounded;
        for (int n = 0; n < N; ++n) {
            round_to(rounded.at[n], sum[n]);
        }
        out[token * width + i] = rounded;
    }
}

// out[t, :] = sum over k of topk_weights[t, k] * y[row_of_slot[t, k], :]
//
// y             [rows, hidden]  rows = T * K
// row_of_slot   [T, K]          -1 where the slot chose no expert
// topk_weights  [T, K]          or null for ones
// out           [T, hidden]
//
// k ascending in the accumulator type, rounded once; a thread owns its columns, so the order does
// not depend on the grid. `vectorised` says that every row is a multiple of 16 bytes at such an
// address. The row indices and weights of a token are read again by each thread: they are a few
// bytes that the block shares through L1.
template <typename T> DEVICE void unpermute(const Unpermute& p) {
    if (p.vectorised) {
        combine_rows<T, 16 / sizeof(T)>(p);
    } else {
        combine_rows<T, 1>(p);
    }
}

template <typename T, int N> DEVICE void backward_row(const UnpermuteBackward& p) {
    using Acc = Accumulator<T>;
    const int64_t row = blockIdx.x;
    const int32_t slot = p.slot_of_row[row];
    const bool live = slot >= 0 && slot < p.slots;
    const int64_t width = p.hidden / N;
    const Vector<T, N>* y = static_cast<const Vector<T, N>*>(p.y) + row * width;
    Vector<T, N>* dy = static_cast<Vector<T, N>*>(p.dy) + row * width;
    Acc* dw = static_cast<Acc*>(p.dw);
    const int32_t row_of_same = p.row_of_slot[row];
    if (threadIdx.x == 0 && (row_of_same < 0 || row_of_same >= p.slots)) {
        dw[row] = 0;
    }
    if (!live) {
        for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
            dy[i] = Vector<T, N>{};
        }
        return;
    }
    const Acc weight = weight_of<Acc>(p.topk_weights, p.weights_dtype, slot);
    const Vector<T, N>* grad = static_cast<const Vector<T, N>*>(p.grad) + slot / p.top_k * width;
    Acc sum = 0;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        const Vector<T, N> g = grad[i];
        const Vector<T, N> values = y[i];
        Vector<T, N> scaled;
        for (int n = 0; n < N; ++n) {
            round_to(scaled.at[n], weight * widen(g.at[n]));
            sum = multiply_add(widen(g.at[n]), widen(values.at[n]), sum);
        }
        dy[i] = scaled;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        dw[slot] = sum;
    }
}

// dy[r, :] = topk_weights[slot] * grad[t, :] and dw[slot] = grad[t, :] . y[r, :]
// where slot = slot_of_row[r] and t = slot / top_k; both zero where there is no slot or no row
//
// grad          [T, hidden]
// y, dy         [slots, hidden]  slots = T * K
// slot_of_row   [slots], row_of_slot [T, K]: each other's inverse
// topk_weights  [T, K], never null
// dw            [T, K]           in the accumulator type
//
// A block per row computes both, so grad and y are read once. Block i also clears dw of slot i,
// should that slot have no row. The sum over a row is taken in an order that depends on hidden
// alone: strided by thread, then block_sum.
template <typename T> DEVICE void unpermute_backward(const UnpermuteBackward& p) {
    if (p.vectorised) {
        backward_row<T, 16 / sizeof(T)>(p);
    } else {
        backward_row<T, 1>(p);
    }
}

#define FOR_TYPE(T, name)                                                                          \
    extern "C" __global__ void __launch_bounds__(256) unpermute_##name(const Unpermute p) {        \
        unpermute<T>(p);                                                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        unpermute_backward_##name(const UnpermuteBackward p) {                                     \
        unpermute_backward<T>(p);                                                                  \
    }
FOR_TYPE(float, f32)
FOR_TYPE(double, f64)
FOR_TYPE(F16, f16)
FOR_TYPE(Bf16, bf16)
