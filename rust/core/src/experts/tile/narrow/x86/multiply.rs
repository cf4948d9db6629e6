//! What each instruction set does with 32 bytes of codes and the values that belong to them.
#![allow(unsafe_code, reason = "vector loads and calls for CPU features that were detected")]
#![allow(clippy::wildcard_imports, reason = "intrinsics by the dozen")]

use super::{BLOCK, Bits};
use std::arch::x86_64::*;

/// Sums of products of a unit of codes, 32 bytes, with the values that belong to it.
///
/// All functions need the CPU features of the implementation.
pub(super) trait Multiply {
    /// Bytes of a block of codes.
    const BLOCK_BYTES: usize;
    /// Bytes of a unit's values.
    const X_BYTES: usize = 2 * BLOCK * (BLOCK / Self::BLOCK_BYTES);
    /// Whether what is multiplied stands above the codes.
    const ABOVE: bool = true;
    type Sum: Copy;
    unsafe fn zero() -> Self::Sum;
    unsafe fn decode(codes: __m256i) -> [__m256i; 2];
    unsafe fn add(sum: Self::Sum, codes: [__m256i; 2], x: *const u8) -> Self::Sum;
    /// Eight parts of the sum of what was added: a segment's blocks at most.
    unsafe fn sum(sum: Self::Sum) -> __m256i;
}

/// 256 times the sums over high bytes, and the sums over low bytes.
pub(super) type Bytes = [__m256i; 2];

/// # Safety
///
/// The CPU has AVX2.
#[inline(always)]
unsafe fn load(x: *const u8, at: usize) -> __m256i {
    // SAFETY: the caller's features; 32 bytes are readable.
    unsafe { _mm256_loadu_si256(x.add(at * BLOCK).cast()) }
}

/// # Safety
///
/// The CPU has AVX2.
#[inline(always)]
unsafe fn halves(codes: __m256i) -> [__m256i; 2] {
    // SAFETY: the caller's features.
    unsafe {
        let mask = _mm256_set1_epi8(15);
        let high = _mm256_srli_epi16::<4>(codes);
        [_mm256_and_si256(codes, mask), _mm256_and_si256(high, mask)]
    }
}

pub(super) struct Int8;

impl Multiply for Int8 {
    const BLOCK_BYTES: usize = Bits::Eight.block_bytes();
    const ABOVE: bool = false;
    type Sum = __m256i;
    #[inline(always)]
    unsafe fn zero() -> __m256i {
        // SAFETY: the caller's features.
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn decode(codes: __m256i) -> [__m256i; 2] {
        // SAFETY: the caller's features.
        unsafe {
            let high = _mm256_extracti128_si256::<1>(codes);
            [_mm256_cvtepi8_epi16(_mm256_castsi256_si128(codes)), _mm256_cvtepi8_epi16(high)]
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256i, codes: [__m256i; 2], x: *const u8) -> __m256i {
        // SAFETY: the caller's features; a unit of values is readable.
        unsafe {
            let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes[0], load(x, 0)));
            _mm256_add_epi32(sum, _mm256_madd_epi16(codes[1], load(x, 1)))
        }
    }
    #[inline(always)]
    unsafe fn sum(sum: __m256i) -> __m256i {
        sum
    }
}

pub(super) struct Int4;

impl Multiply for Int4 {
    const BLOCK_BYTES: usize = Bits::Four.block_bytes();
    type Sum = Bytes;
    #[inline(always)]
    unsafe fn zero() -> Bytes {
        // SAFETY: the caller's features.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn decode(codes: __m256i) -> [__m256i; 2] {
        // SAFETY: the caller's features.
        unsafe { halves(codes) }
    }
    /// In 16 bits: 8 products of a pair of codes, as a segment has, are at most 8 · 2 · 15 · 128.
    #[inline(always)]
    unsafe fn add(sum: Bytes, codes: [__m256i; 2], x: *const u8) -> Bytes {
        // SAFETY: the caller's features; a unit of values is readable.
        unsafe {
            let mut sum = sum;
            for half in 0..2 {
                for byte in 0..2 {
                    let products = _mm256_maddubs_epi16(codes[half], load(x, 2 * half + byte));
                    sum[byte] = _mm256_add_epi16(sum[byte], products);
                }
            }
            sum
        }
    }
    #[inline(always)]
    unsafe fn sum([high, low]: Bytes) -> __m256i {
        // SAFETY: the caller's features.
        unsafe {
            let high = _mm256_madd_epi16(high, _mm256_set1_epi16(256));
            _mm256_add_epi32(high, _mm256_madd_epi16(low, _mm256_set1_epi16(1)))
        }
    }
}

/// # Safety
///
/// The CPU has AVX-512 VL and VNNI.
#[inline(always)]
unsafe fn sum_vnni([high, low]: Bytes) -> __m256i {
    // SAFETY: the caller's features.
    unsafe { _mm256_add_epi32(_mm256_slli_epi32::<8>(high), low) }
}

pub(super) struct Int8Vnni;

impl Multiply for Int8Vnni {
    const BLOCK_BYTES: usize = Bits::Eight.block_bytes();
    type Sum = Bytes;
    #[inline(always)]
    unsafe fn zero() -> Bytes {
        // SAFETY: the caller's features.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    /// The one factor of a product that has no sign.
    #[inline(always)]
    unsafe fn decode(codes: __m256i) -> [__m256i; 2] {
        // SAFETY: the caller's features.
        unsafe { [_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), codes] }
    }
    #[inline(always)]
    unsafe fn add(sum: Bytes, [codes, _]: [__m256i; 2], x: *const u8) -> Bytes {
        // SAFETY: the caller's features; a unit of values is readable.
        unsafe {
            let [high, low] = sum;
            let high = _mm256_dpbusd_epi32(high, codes, load(x, 0));
            [high, _mm256_dpbusd_epi32(low, codes, load(x, 1))]
        }
    }
    #[inline(always)]
    unsafe fn sum(sum: Bytes) -> __m256i {
        // SAFETY: the caller's features.
        unsafe { sum_vnni(sum) }
    }
}

pub(super) struct Int4Vnni;

impl Multiply for Int4Vnni {
    const BLOCK_BYTES: usize = Bits::Four.block_bytes();
    type Sum = Bytes;
    #[inline(always)]
    unsafe fn zero() -> Bytes {
        // SAFETY: the caller's features.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn decode(codes: __m256i) -> [__m256i; 2] {
        // SAFETY: the caller's features.
        unsafe { halves(codes) }
    }
    #[inline(always)]
    unsafe fn add(sum: Bytes, codes: [__m256i; 2], x: *const u8) -> Bytes {
        // SAFETY: the caller's features; a unit of values is readable.
        unsafe {
            let mut sum = sum;
            for half in 0..2 {
                for byte in 0..2 {
                    let x = load(x, 2 * half + byte);
                    sum[byte] = _mm256_dpbusd_epi32(sum[byte], codes[half], x);
                }
            }
            sum
        }
    }
    #[inline(always)]
    unsafe fn sum(sum: Bytes) -> __m256i {
        // SAFETY: the caller's features.
        unsafe { sum_vnni(sum) }
    }
}
