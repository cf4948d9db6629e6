//! Launcher, parameter structs and kernels as one, on a driver that runs the kernels on the host.
#![allow(unsafe_code, reason = "hands host memory to the emulated GPU")]

use ferromoe_core::permute as core;
use ferromoe_core::{Dtype, Element};
use ferromoe_cuda::permute::{Maps, permute, unpermute, unpermute_backward};
use ferromoe_cuda::{Array, ArrayMut, IMAGES, Stream, warmup};
use half::{bf16, f16};
use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::OnceLock;

/// The emulator, compiled and set as this process's driver; None where that is impossible.
fn emulator() -> Option<&'static PathBuf> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            if IMAGES.is_empty() {
                eprintln!("skipped: this build has no kernels to launch (no nvcc)");
                return None;
            }
            let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let library = folder.join(format!("libcuda-{}.so", std::process::id()));
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
            let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
            // A misaligned access is an error on a GPU, so it traps here.
            let flags = "-std=c++17 -O1 -fPIC -shared -fsanitize=alignment \
                         -fsanitize-undefined-trap-on-error -Wall -Wextra -Werror";
            let status = Command::new(compiler)
                .args(flags.split_whitespace())
                .arg("-I")
                .arg(source.join("device"))
                .arg("-I")
                .arg(source.join("emulator"))
                .arg(source.join("emulator/driver.cpp"))
                .arg("-o")
                .arg(&library)
                .status();
            let Ok(status) = status else {
                eprintln!("skipped: there is no C++ compiler");
                return None;
            };
            assert!(status.success(), "the emulator does not compile");
            let log = library.with_extension("log");
            let _ = std::fs::remove_file(&log);
            // SAFETY: every test comes through here first, and none reads or writes the
            // environment elsewhere.
            unsafe {
                std::env::set_var("FERROMOE_LIBCUDA", &library);
                std::env::set_var("EMULATOR_DEVICES", "3");
                std::env::set_var("EMULATOR_LOG", log);
            }
            Some(library)
        })
        .as_ref()
}

fn stream(device: i32) -> Stream {
    // SAFETY: the emulator has no streams, so null is as good as any.
    unsafe { Stream::new(device, null_mut()) }.unwrap()
}

fn array<T>(values: &[T], dtype: Dtype) -> Array<'_> {
    // SAFETY: the emulator's memory is ours, and it is done when a launch returns.
    unsafe { Array::new(values.as_ptr().cast(), values.len(), dtype) }
}

fn array_mut<T>(values: &mut [T], dtype: Dtype) -> ArrayMut<'_> {
    // SAFETY: as above.
    unsafe { ArrayMut::new(values.as_mut_ptr().cast(), values.len(), dtype) }
}

/// Small whole numbers and quarters: every product and sum of them is exact in float32, so the
/// answer does not depend on the order of a sum.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        (self.0 >> 33) % end
    }

    fn floats<T: Element>(&mut self, n: usize) -> Vec<T> {
        let accumulator = |x| <T::Acc as ferromoe_core::dtype::Accumulator>::from_f64(x);
        (0..n).map(|_| T::round(accumulator(self.below(15) as f64 - 7.0))).collect()
    }
}

struct Plan {
    tokens: usize,
    top_k: usize,
    slot_of_row: Vec<i32>,
    row_of_slot: Vec<i32>,
}

impl Plan {
    /// A dispatch in which about a fifth of the slots choose no expert.
    fn new(tokens: usize, top_k: usize, numbers: &mut Numbers) -> Self {
        let experts: Vec<u64> = (0..tokens * top_k).map(|_| numbers.below(5)).collect();
        let mut slots: Vec<usize> = (0..experts.len()).filter(|&slot| experts[slot] < 4).collect();
        slots.sort_by_key(|&slot| (experts[slot], slot));
        let mut slot_of_row = vec![-1; experts.len()];
        let mut row_of_slot = vec![-1; experts.len()];
        for (row, &slot) in slots.iter().enumerate() {
            slot_of_row[row] = slot as i32;
            row_of_slot[slot] = row as i32;
        }
        Self { tokens, top_k, slot_of_row, row_of_slot }
    }

    fn slots(&self) -> usize {
        self.tokens * self.top_k
    }

    fn host(&self) -> core::Maps<'_> {
        let Self { tokens, top_k, slot_of_row, row_of_slot } = self;
        core::Maps { slot_of_row, row_of_slot, tokens: *tokens, top_k: *top_k }
    }

    fn device(&self) -> Maps<'_> {
        Maps {
            slot_of_row: array(&self.slot_of_row, Dtype::I32),
            row_of_slot: array(&self.row_of_slot, Dtype::I32),
            top_k: self.top_k,
        }
    }
}

/// Tokens, `top_k`, hidden: nothing, one of each, odd widths, one load per thread and several.
const SHAPES: [(usize, usize, usize); 7] =
    [(0, 2, 8), (3, 2, 0), (1, 1, 1), (5, 3, 7), (4, 2, 40), (7, 8, 129), (2, 1, 4096)];

#[test]
fn permute_moves_the_rows_that_the_cpu_moves_in_any_unit() {
    if emulator().is_none() {
        return;
    }
    let mut numbers = Numbers(1);
    for (tokens, top_k, hidden) in SHAPES {
        let plan = Plan::new(tokens, top_k, &mut numbers);
        let x: Vec<u64> = (0..=tokens * hidden).map(|_| numbers.below(u64::MAX)).collect();
        for (dtype, size) in [(Dtype::U8, 1), (Dtype::BF16, 2), (Dtype::F32, 4), (Dtype::I64, 8)] {
            // SAFETY: the numbers, seen as bytes; any byte will do.
            let bytes = unsafe { std::slice::from_raw_parts(x.as_ptr().cast::<u8>(), x.len() * 8) };
            // Once aligned as vectors are, once only as the type is.
            for begin in [0, size] {
                let x = &bytes[begin..begin + tokens * hidden * size];
                let mut expected = vec![9; plan.slots() * hidden * size];
                core::permute(x, hidden * size, plan.host(), &mut expected).unwrap();
                let mut out = vec![9; expected.len()];
                // SAFETY: as in `array`, with lengths in elements.
                let (x, mut out_array) = unsafe {
                    let out = ArrayMut::new(out.as_mut_ptr(), plan.slots() * hidden, dtype);
                    (Array::new(x.as_ptr(), tokens * hidden, dtype), out)
                };
                permute(stream(0), x, hidden, plan.device(), &mut out_array).unwrap();
                assert_eq!(out, expected, "{tokens} {top_k} {hidden} {dtype:?} {begin}");
            }
        }
    }
}

fn check_unpermute<T: Element + std::fmt::Debug, W: Element>(seed: u64)
where
    T::Acc: std::fmt::Debug,
{
    use ferromoe_core::dtype::Accumulator;
    let mut numbers = Numbers(seed);
    for (tokens, top_k, hidden) in SHAPES {
        let plan = Plan::new(tokens, top_k, &mut numbers);
        let mut y: Vec<T> = numbers.floats(plan.slots() * hidden);
        // What lies past the last routed row must never count.
        for (row, _) in plan.slot_of_row.iter().enumerate().filter(|(_, slot)| **slot < 0) {
            y[row * hidden..(row + 1) * hidden].fill(T::round(T::Acc::from_f64(f64::NAN)));
        }
        let narrow: Vec<W> = numbers.floats(plan.slots());
        let weights: Vec<T::Acc> =
            narrow.iter().map(|w| T::Acc::from_f64(w.widen().to_f64())).collect();
        let grad: Vec<T> = numbers.floats(tokens * hidden);
        let nine = T::Acc::from_f64(9.0);

        let y_array = array(&y, T::DTYPE);
        for weighted in [false, true] {
            let host = weighted.then_some(weights.as_slice());
            let device = weighted.then(|| array(&narrow, W::DTYPE));
            let mut expected = vec![T::round(nine); tokens * hidden];
            core::unpermute(&y, hidden, plan.host(), host, false, &mut expected).unwrap();
            let mut out = vec![T::round(nine); tokens * hidden];
            let mut out_array = array_mut(&mut out, T::DTYPE);
            unpermute(stream(0), y_array, hidden, plan.device(), device, &mut out_array).unwrap();
            assert_eq!(out, expected, "{tokens} {top_k} {hidden} weighted {weighted}");
        }

        let mut expected = (vec![T::round(nine); y.len()], vec![nine; plan.slots()]);
        let (dy, dw) = (&mut expected.0, &mut expected.1);
        core::unpermute_backward(&grad, &y, hidden, plan.host(), &weights, dy, dw).unwrap();
        let (mut dy, mut dw) = (vec![T::round(nine); y.len()], vec![nine; plan.slots()]);
        let sums = if T::DTYPE == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        unpermute_backward(
            stream(0),
            array(&grad, T::DTYPE),
            y_array,
            hidden,
            plan.device(),
            array(&narrow, W::DTYPE),
            &mut array_mut(&mut dy, T::DTYPE),
            &mut array_mut(&mut dw, sums),
        )
        .unwrap();
        assert_eq!((dy, dw), expected, "gradients, {tokens} {top_k} {hidden}");
    }
}

#[test]
fn unpermute_and_its_gradients_give_what_the_cpu_gives_in_every_dtype() {
    if emulator().is_none() {
        return;
    }
    check_unpermute::<f32, f32>(2);
    check_unpermute::<f64, f64>(3);
    check_unpermute::<f16, f16>(4);
    check_unpermute::<bf16, bf16>(5);
    check_unpermute::<bf16, f32>(6);
    check_unpermute::<f32, f64>(7);
}

#[test]
fn sixteen_bit_sums_round_once_and_to_nearest() {
    fn check<T: Element + std::fmt::Debug>(dtype: Dtype, numbers: &mut Numbers) {
        use ferromoe_core::dtype::Accumulator;
        let (tokens, top_k, hidden) = (64, 3, 16);
        let plan = Plan::new(tokens, top_k, numbers);
        // Products of two 16-bit numbers are exact in float32, so a fused multiply-add changes
        // nothing and the bits must agree. Exponents reach from subnormal halves to overflow.
        let mut floats = |n, scale: i32| -> Vec<T> {
            let mut float = || {
                let exponent = numbers.below(34) as i32 - 20 + scale;
                (numbers.below(1 << 12) as f64 / 2048.0 - 1.0) * 2f64.powi(exponent)
            };
            (0..n).map(|_| T::round(T::Acc::from_f64(float()))).collect()
        };
        let (y, narrow) = (floats(plan.slots() * hidden, 0), floats(plan.slots(), 2));
        let weights: Vec<T::Acc> = narrow.iter().map(|w| w.widen()).collect();
        let mut expected = vec![T::default(); tokens * hidden];
        core::unpermute(&y, hidden, plan.host(), Some(&weights), false, &mut expected).unwrap();
        let mut out = expected.iter().map(|_| T::default()).collect::<Vec<_>>();
        let mut out_array = array_mut(&mut out, dtype);
        let weights = Some(array(&narrow, dtype));
        let (maps, y) = (plan.device(), array(&y, dtype));
        unpermute(stream(0), y, hidden, maps, weights, &mut out_array).unwrap();
        assert_eq!(out, expected);
        assert!(out.iter().any(|x| x.widen() != T::Acc::default()));
    }
    if emulator().is_none() {
        return;
    }
    check::<f16>(Dtype::F16, &mut Numbers(9));
    check::<bf16>(Dtype::BF16, &mut Numbers(10));
}

#[test]
fn an_index_out_of_range_is_treated_like_none_and_never_followed() {
    if emulator().is_none() {
        return;
    }
    let plan = Plan {
        tokens: 2,
        top_k: 1,
        slot_of_row: vec![1, i32::MAX],
        row_of_slot: vec![-7, 1 << 30],
    };
    let (x, mut out) = ([1.0f32, 2.0], [9.0f32; 2]);
    let mut out_array = array_mut(&mut out, Dtype::F32);
    permute(stream(0), array(&x, Dtype::F32), 1, plan.device(), &mut out_array).unwrap();
    assert_eq!(out, [2.0, 0.0]);
    let mut out_array = array_mut(&mut out, Dtype::F32);
    unpermute(stream(0), array(&x, Dtype::F32), 1, plan.device(), None, &mut out_array).unwrap();
    assert_eq!(out, [0.0, 0.0]);
}

#[test]
fn a_launch_goes_to_the_stream_it_was_given_and_loads_once() {
    let Some(library) = emulator() else { return };
    let plan = Plan::new(600, 2, &mut Numbers(8));
    let x = vec![0u8; 600 * 16];
    for handle in [0x10, 0x20] {
        // SAFETY: the emulator only writes the handle down.
        let stream = unsafe { Stream::new(2, without_provenance_mut(handle)) }.unwrap();
        let mut out = vec![0; 1200 * 16];
        let mut out = array_mut(&mut out, Dtype::U8);
        permute(stream, array(&x, Dtype::U8), 16, plan.device(), &mut out).unwrap();
    }
    let log = std::fs::read_to_string(library.with_extension("log")).unwrap();
    let lines: Vec<_> = log.lines().filter_map(|line| line.strip_prefix("device 2 ")).collect();
    let launch = "permute_rows grid 1200x1 threads 32 stream";
    assert_eq!(lines, ["load".into(), format!("{launch} 0x10"), format!("{launch} 0x20")]);
}

/// Makes every stream of this thread capture, or every launch fail.
fn pretend(library: &Path, capturing: c_int, launch_result: c_int) {
    // SAFETY: the library is the emulator, which has the function with this signature.
    unsafe {
        let library = libloading::Library::new(library).unwrap();
        let pretend = library.get::<unsafe extern "C" fn(c_int, c_int)>(b"emulator_pretend\0");
        pretend.unwrap()(capturing, launch_result);
        std::mem::forget(library);
    }
}

fn permute_one_row(device: i32) -> ferromoe_cuda::Result<()> {
    let plan = Plan::new(1, 1, &mut Numbers(0));
    let (x, mut out) = ([1.0f32], [0.0f32]);
    let mut out = array_mut(&mut out, Dtype::F32);
    permute(stream(device), array(&x, Dtype::F32), 1, plan.device(), &mut out)
}

#[test]
fn a_first_use_inside_a_captured_graph_asks_for_a_warmup() {
    let Some(library) = emulator() else { return };
    pretend(library, 1, 0);
    let error = permute_one_row(1).unwrap_err().to_string();
    assert!(error.starts_with("permute_rows is first used while a CUDA graph is captured"));
    warmup(1).unwrap();
    permute_one_row(1).unwrap();
}

#[test]
fn a_refused_launch_is_told_with_kernel_shape_and_architecture() {
    let Some(library) = emulator() else { return };
    pretend(library, 0, 1);
    assert_eq!(
        permute_one_row(0).unwrap_err().to_string(),
        "permute_rows on [1, 1] float32, top_k 1 (sm_90): CUDA error 1, \
         CUDA_ERROR_INVALID_VALUE: said by the emulator"
    );
}

#[test]
fn a_wrong_length_or_dtype_never_reaches_the_driver() {
    if emulator().is_none() {
        return;
    }
    let plan = Plan::new(2, 1, &mut Numbers(0));
    let (x, mut out) = ([0.0f32; 3], [0.0f32; 2]);
    let mut out = array_mut(&mut out, Dtype::F32);
    let error = permute(stream(0), array(&x, Dtype::F32), 1, plan.device(), &mut out).unwrap_err();
    assert_eq!(error.to_string(), "permute: x must have shape [2], got [3]");
    let x = array(&x[..2], Dtype::I32);
    let error = unpermute(stream(0), x, 1, plan.device(), None, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "unpermute: out must be int32, got float32");
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    if emulator().is_none() {
        return;
    }
    // SAFETY: there is no stream to speak of.
    let error = unsafe { Stream::new(3, null_mut()) }.unwrap_err().to_string();
    assert!(error.starts_with("CUDA device 3: CUDA error 101, CUDA_ERROR_INVALID_DEVICE"));
}
