//! The fat binaries that `build.rs` compiled, and the list of kernels a chip has verified.

/// The kernels of one `cuda/*.cu`, compiled for several architectures.
#[derive(Debug)]
#[non_exhaustive]
pub struct Image {
    /// Name of the source without its ending.
    pub name: &'static str,
    /// Targets as the source names them: `80 90 +80`, a plus meaning PTX.
    pub archs: &'static str,
    /// Hash of `bytes`; an entry of the verified list is good for one fingerprint.
    pub fingerprint: &'static str,
    /// The fat binary.
    pub bytes: &'static [u8],
}

/// `build.rs` writes one `image!(name, archs, fingerprint, file)` per source.
#[allow(unused_macros, reason = "a build without kernels has no image")]
macro_rules! image {
    ($name:literal, $archs:literal, $fingerprint:literal, $file:literal) => {{
        // The driver reads the header of a fat binary in place, as 64-bit numbers.
        #[repr(C, align(64))]
        struct Aligned<const N: usize>([u8; N]);
        const BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/", $file));
        static IMAGE: Aligned<{ BYTES.len() }> =
            Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $file)));
        Image { name: $name, archs: $archs, fingerprint: $fingerprint, bytes: &IMAGE.0 }
    }};
}

/// Every image of this build; none in a build without nvcc.
pub static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Lines of `kernel compute_capability fingerprint`, written by `make gpu-check`.
const VERIFIED: &str = include_str!("../../../cuda/verified.txt");

/// Kernels of this build that gave right answers on a chip, with its compute capability (90 for
/// 9.0).
pub fn verified_kernels() -> impl Iterator<Item = (&'static str, i32)> {
    entries(VERIFIED).filter_map(|(kernel, cc, fingerprint)| {
        let kernel = crate::kernels().find(|it| it.name() == kernel)?;
        // Another compiler or an edit makes other code, of which nobody has seen the answers.
        let image = IMAGES.iter().find(|image| image.name == kernel.image())?;
        (image.fingerprint == fingerprint).then_some((kernel.name(), cc))
    })
}

/// Whether a chip of compute capability `cc` has run this very code of `kernel` and gave right
/// answers. Other kernels run only when asked for.
pub fn verified(kernel: &str, cc: i32) -> bool {
    verified_kernels().any(|entry| entry == (kernel, cc))
}

fn entries(list: &str) -> impl Iterator<Item = (&str, i32, &str)> {
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.next()?.parse().ok()?, words.next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verified_list_holds_entries_and_comments_only() {
        let lines = VERIFIED.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        assert_eq!(entries(VERIFIED).count(), lines.count());
    }

    #[test]
    fn an_entry_is_kernel_capability_and_fingerprint() {
        let list = "# comment\n\npermute_rows 90 00ff\nbroken\n";
        assert_eq!(entries(list).collect::<Vec<_>>(), [("permute_rows", 90, "00ff")]);
    }

    #[test]
    fn an_image_is_a_fat_binary_at_an_aligned_address() {
        for image in IMAGES {
            assert_eq!(image.bytes[..4], 0xba55_ed50_u32.to_le_bytes(), "{}", image.name);
            assert!(image.bytes.as_ptr().addr().is_multiple_of(64));
        }
    }
}
