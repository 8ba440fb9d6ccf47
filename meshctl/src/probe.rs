//! Native libraries opened at run time, asked for their version, and closed again. For `doctor`; nothing here is served with.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint};

use libloading::{Library, Symbol};

/// What is known of a native library.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Native {
    /// Whether it can be used.
    pub usable: bool,
    /// The file that was opened, or the first that was looked for.
    pub library: String,
    /// Its version and what it found; empty when it cannot be opened.
    pub found: String,
    /// Why it cannot be used; empty when it can.
    pub why_not: String,
}

impl Native {
    fn missing(names: &[&str], errors: &[String], remedy: &str) -> Self {
        let why_not = format!("{}; {remedy}", errors.join("; "));
        let library = names.first().map(|n| (*n).to_owned()).unwrap_or_default();
        Self { usable: false, library, found: String::new(), why_not }
    }

    fn usable(library: String, found: String) -> Self {
        Self { usable: true, library, found, why_not: String::new() }
    }

    fn broken(library: String, why_not: String) -> Self {
        Self { usable: false, library, found: String::new(), why_not }
    }
}

/// Opens the first of `names` that the loader finds.
fn open(names: &[&str]) -> Result<(Library, String), Vec<String>> {
    let mut errors = Vec::new();
    for name in names {
        // SAFETY: these are well-known system libraries whose initialisers need nothing of us; they are opened from the
        // command's only thread.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok((library, (*name).to_owned())),
            Err(error) => errors.push(error.to_string()),
        }
    }
    Err(errors)
}

/// The library's symbol, or why it has none.
///
/// # Safety
/// `T` must be the symbol's type in the library's headers.
unsafe fn symbol<'a, T>(library: &'a Library, name: &str) -> Result<Symbol<'a, T>, String> {
    // SAFETY: the caller's promise.
    unsafe { library.get(name.as_bytes()) }.map_err(|e| format!("{name}: {e}"))
}

/// UCX.
pub fn ucx() -> Native {
    let names = ["libucp.so.0"];
    let (library, name) = match open(&names) {
        Ok(opened) => opened,
        Err(errors) => return Native::missing(&names, &errors, "install UCX (Debian: libucx0); TCP is used instead"),
    };
    // SAFETY: ucp.h: `const char *ucp_get_version_string(void)`.
    match unsafe { symbol::<unsafe extern "C" fn() -> *const c_char>(&library, "ucp_get_version_string") } {
        Ok(version) => {
            // SAFETY: no argument; the result is a static string in the library, which is open until this function ends.
            let version = unsafe { CStr::from_ptr(version()) }.to_string_lossy().into_owned();
            Native::usable(name, format!("UCX {version}"))
        }
        Err(why) => Native::broken(name, why),
    }
}

/// The CUDA driver and its devices.
pub fn cuda() -> Native {
    let names = ["libcuda.so.1"];
    let (library, name) = match open(&names) {
        Ok(opened) => opened,
        Err(errors) => return Native::missing(&names, &errors, "there is no NVIDIA driver on this machine"),
    };
    match cuda_devices(&library) {
        Ok(found) => Native::usable(name, found),
        Err(why) => Native::broken(name, why),
    }
}

fn cuda_devices(library: &Library) -> Result<String, String> {
    type Init = unsafe extern "C" fn(c_uint) -> c_int;
    type GetInt = unsafe extern "C" fn(*mut c_int) -> c_int;
    type GetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    // SAFETY: cuda.h: `CUresult cuInit(unsigned int)`.
    let init = unsafe { symbol::<Init>(library, "cuInit") }?;
    // SAFETY: cuda.h: `CUresult cuDriverGetVersion(int *)` and `CUresult cuDeviceGetCount(int *)`.
    let (version_of, count_of) =
        unsafe { (symbol::<GetInt>(library, "cuDriverGetVersion")?, symbol::<GetInt>(library, "cuDeviceGetCount")?) };
    // SAFETY: cuda.h: `CUresult cuDeviceGetName(char *, int, CUdevice)`, a CUdevice being an int.
    let name_of = unsafe { symbol::<GetName>(library, "cuDeviceGetName") }?;

    let check =
        |what: &str, code: c_int| if code == 0 { Ok(()) } else { Err(format!("{what} failed with CUDA error {code}")) };
    // SAFETY: 0 is the only flag word there is.
    check("cuInit", unsafe { init(0) })?;
    let (mut version, mut count) = (0, 0);
    // SAFETY: both write one int where the pointer leads, which is a local of ours.
    check("cuDriverGetVersion", unsafe { version_of(&raw mut version) })?;
    // SAFETY: as above.
    check("cuDeviceGetCount", unsafe { count_of(&raw mut count) })?;
    if count == 0 {
        return Err("the driver sees no device".to_owned());
    }
    let mut names = Vec::new();
    for device in 0..count {
        let mut name: [c_char; 128] = [0; 128];
        // SAFETY: it writes at most the given length, with its final zero, into a local array of that length.
        check("cuDeviceGetName", unsafe { name_of(name.as_mut_ptr(), name.len() as c_int, device) })?;
        // SAFETY: the array was zeroed and the call above ends what it writes with a zero.
        names.push(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned());
    }
    Ok(format!("CUDA driver {}.{}, {}", version / 1000, version % 1000 / 10, names.join(", ")))
}

/// NCCL.
pub fn nccl() -> Native {
    let names = ["libnccl.so.2", "libnccl.so"];
    let (library, name) = match open(&names) {
        Ok(opened) => opened,
        Err(errors) => return Native::missing(&names, &errors, "install NCCL, or put its folder into LD_LIBRARY_PATH"),
    };
    // SAFETY: nccl.h: `ncclResult_t ncclGetVersion(int *)`.
    let get = match unsafe { symbol::<unsafe extern "C" fn(*mut c_int) -> c_int>(&library, "ncclGetVersion") } {
        Ok(get) => get,
        Err(why) => return Native::broken(name, why),
    };
    let mut version = 0;
    // SAFETY: it writes one int where the pointer leads, which is a local of ours.
    let code = unsafe { get(&raw mut version) };
    if code != 0 {
        return Native::broken(name, format!("ncclGetVersion failed with {code}"));
    }
    Native::usable(name, format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// The run-time compiler of CUDA kernels.
pub fn nvrtc() -> Native {
    let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    let (library, name) = match open(&names) {
        Ok(opened) => opened,
        Err(errors) => {
            return Native::missing(&names, &errors, "install NVRTC, or put its folder into LD_LIBRARY_PATH");
        }
    };
    // SAFETY: nvrtc.h: `nvrtcResult nvrtcVersion(int *, int *)`.
    let get = match unsafe { symbol::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(&library, "nvrtcVersion") }
    {
        Ok(get) => get,
        Err(why) => return Native::broken(name, why),
    };
    let (mut major, mut minor) = (0, 0);
    // SAFETY: it writes one int at each pointer, which are locals of ours.
    let code = unsafe { get(&raw mut major, &raw mut minor) };
    if code != 0 {
        return Native::broken(name, format!("nvrtcVersion failed with {code}"));
    }
    Native::usable(name, format!("NVRTC {major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_is_usable_or_says_why_not() {
        for native in [ucx(), cuda(), nccl(), nvrtc()] {
            assert_ne!(native.usable, native.found.is_empty(), "{native:?}");
            assert_ne!(native.usable, !native.why_not.is_empty(), "{native:?}");
        }
    }

    #[test]
    fn a_library_that_does_not_exist_is_named() {
        let names = ["libno-such-library.so.1"];
        let errors = open(&names).map(|(_, name)| name).unwrap_err();
        let native = Native::missing(&names, &errors, "remedy");
        assert!(native.why_not.contains("libno-such-library.so.1") && native.why_not.ends_with("remedy"), "{native:?}");
    }
}
