//! Compiles every `cuda/*.cu` into a fat binary with nvcc, for `src/images.rs` to embed.
//!
//! `FERROMOE_CUDA` is `auto` (without nvcc there is a warning and no kernel), `require` (without
//! nvcc the build fails) or `off`. nvcc is looked for in `FERROMOE_NVCC`, in the packages of the
//! Python that builds, in `CUDA_HOME`, on `PATH`. For work on kernels: `FERROMOE_CUDA_ARCHS="90"`
//! replaces the targets of every source, `FERROMOE_CUDA_LINEINFO=1` adds line information,
//! `FERROMOE_CUDA_VERBOSE=1` prints registers and spills.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const VARIABLES: [&str; 8] = [
    "FERROMOE_CUDA",
    "FERROMOE_NVCC",
    "FERROMOE_CUDA_ARCHS",
    "FERROMOE_CUDA_LINEINFO",
    "FERROMOE_CUDA_VERBOSE",
    "PYO3_PYTHON",
    "CUDA_HOME",
    "NVCC_CCBIN",
];

fn main() {
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = manifest.join("../../cuda").canonicalize().expect("the workspace has cuda/");
    println!("cargo::rerun-if-changed={}", root.display());
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));

    let images = match compiler() {
        Some(nvcc) => compile_all(&nvcc, &root, &out),
        None => Vec::new(),
    };
    let rows: String = images.iter().map(Image::row).collect();
    fs::write(out.join("images.rs"), format!("&[\n{rows}]\n")).expect("OUT_DIR can be written");
}

/// nvcc, unless this build goes without kernels.
fn compiler() -> Option<PathBuf> {
    let mode = env::var("FERROMOE_CUDA").unwrap_or_else(|_| "auto".into());
    assert!(
        ["auto", "require", "off"].contains(&mode.as_str()),
        "FERROMOE_CUDA must be auto, require or off, got {mode:?}"
    );
    // NVIDIA has no compiler for macOS; kernels for Windows are not built yet.
    let possible = env::var_os("CARGO_FEATURE_KERNELS").is_some()
        && env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux");
    if mode == "off" || !possible {
        assert!(mode != "require", "FERROMOE_CUDA=require, but this target has no CUDA kernels");
        return None;
    }
    let nvcc = find_nvcc();
    if nvcc.is_none() {
        let looked = "FERROMOE_NVCC, the building Python, CUDA_HOME or PATH";
        assert!(mode != "require", "FERROMOE_CUDA=require, but no nvcc in {looked}");
        println!("cargo::warning=no nvcc in {looked}: this build has no CUDA kernels");
    }
    nvcc
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(path) = env::var_os("FERROMOE_NVCC") {
        return Some(path.into());
    }
    // maturin names the interpreter it builds for, and in an isolated build that one sees the
    // packages of [build-system].requires. They put nothing on PATH.
    let python = env::var_os("PYO3_PYTHON")
        .or_else(|| env::var_os("PYTHON_SYS_EXECUTABLE"))
        .unwrap_or_else(|| "python3".into());
    let probe = "import importlib.util as u, os\n\
                 spec = u.find_spec('nvidia')\n\
                 for folder in spec.submodule_search_locations if spec else ():\n\
                 \x20   path = os.path.join(folder, 'cu13', 'bin', 'nvcc')\n\
                 \x20   if os.path.exists(path): print(path); break\n";
    if let Ok(output) = Command::new(python).args(["-c", probe]).output() {
        let path = String::from_utf8_lossy(&output.stdout).trim().to_string();
        if !path.is_empty() {
            return Some(path.into());
        }
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = home.into_iter().chain(env::split_paths(&path));
    folders.find_map(|folder| Some(folder.join("nvcc")).filter(|nvcc| nvcc.is_file()))
}

/// One compiled family of kernels.
struct Image {
    name: String,
    archs: String,
    path: PathBuf,
}

impl Image {
    /// Its row of the table that `src/images.rs` includes.
    fn row(&self) -> String {
        let Self { name, archs, path } = self;
        let bytes = fs::read(path).expect("it was just compiled");
        // Of the machine code, not of the source: a comment may change without a new GPU check.
        let fingerprint = format!("{:016x}", fnv1a(&bytes));
        let file = path.file_name().and_then(|file| file.to_str()).expect("a plain name");
        format!("image!({name:?}, {archs:?}, {fingerprint:?}, {file:?}),\n")
    }
}

/// FNV-1a: small, and the same number in every version of Rust.
fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of cuda/");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry of cuda/").path())
        .filter(|path| path.extension().is_some_and(|it| it == extension))
        .collect();
    files.sort();
    files
}

/// `80 90a +80` means machine code of `sm_80` and `sm_90a`, and PTX of `compute_80`.
fn targets(archs: &str) -> Vec<String> {
    let target = |arch: &str| match arch.strip_prefix('+') {
        Some(arch) => format!("-gencode=arch=compute_{arch},code=compute_{arch}"),
        None => format!("-gencode=arch=compute_{arch},code=sm_{arch}"),
    };
    archs.split_whitespace().map(target).collect()
}

fn compile_all(nvcc: &Path, root: &Path, out: &Path) -> Vec<Image> {
    let version = Command::new(nvcc)
        .arg("--version")
        .output()
        .unwrap_or_else(|error| panic!("{} does not run: {error}", nvcc.display()))
        .stdout;
    // A header may serve any source, so each image depends on all of them.
    let mut common = version;
    for header in files(&root.join("device"), "cuh") {
        common.extend(fs::read(header).expect("a header of cuda/device"));
    }
    files(root, "cu").iter().map(|source| compile(nvcc, root, out, source, &common)).collect()
}

/// Compiles `source`, unless `OUT_DIR` has the result from the same text, flags and compiler.
fn compile(nvcc: &Path, root: &Path, out: &Path, source: &Path, common: &[u8]) -> Image {
    let text = fs::read_to_string(source).expect("a source of cuda/");
    let archs = env::var("FERROMOE_CUDA_ARCHS").unwrap_or_else(|_| {
        let line = text.lines().next().and_then(|line| line.strip_prefix("// archs: "));
        line.unwrap_or_else(|| panic!("{} must open with `// archs: …`", source.display())).into()
    });
    let mut flags = targets(&archs);
    let fixed = "-std=c++17 -O3 -fatbin --compress-mode=size -Werror all-warnings";
    flags.extend(fixed.split(' ').map(Into::into));
    flags.push(format!("-t{}", env::var("NUM_JOBS").as_deref().unwrap_or("1")));
    let asked = |variable| env::var_os(variable).is_some_and(|value| value != "0");
    if asked("FERROMOE_CUDA_LINEINFO") {
        flags.push("-lineinfo".into());
    }
    if asked("FERROMOE_CUDA_VERBOSE") {
        flags.extend(["-Xptxas".into(), "-v".into()]);
    }

    let name = source.file_stem().and_then(|stem| stem.to_str()).expect("a plain name").to_string();
    let key = fnv1a(&[text.as_bytes(), flags.join(" ").as_bytes(), common].concat());
    let path = out.join(format!("{name}-{key:016x}.fatbin"));
    if !path.exists() {
        let unfinished = path.with_extension("unfinished");
        let mut command = Command::new(nvcc);
        command.args(&flags).arg("-I").arg(root.join("device")).arg(source);
        let output = command.arg("-o").arg(&unfinished).output().expect("nvcc ran before");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "nvcc failed on {}:\n{told}", source.display());
        for line in told.lines() {
            println!("cargo::warning={line}");
        }
        fs::rename(&unfinished, &path).expect("OUT_DIR can be written");
    }
    Image { name, archs, path }
}
