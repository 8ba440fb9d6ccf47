//! Raw bindings to UCP, opened at run time: nothing of UCX is needed to build, and a machine without it gets an error.
//!
//! Generated from the headers of UCX 1.13.1 and good for every later 1.x (structures only grow, and say by a mask which
//! fields are in use). Every function is a method of [`Ucp`], as unsafe as its C original; the safe wrapper is
//! `mesh_transport::ucx`.
//!
//! # Layout
//! - `bindings`: written by `regenerate.sh`, re-exported whole
//! - [`Ucp::open`], [`Ucp::version`]: all that is not generated

#[allow(missing_docs, non_camel_case_types, non_upper_case_globals, non_snake_case)]
#[allow(clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
mod bindings;

use std::path::Path;

pub use bindings::*;
pub use libloading::Error;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// The name that every UCX 1.x is found by.
pub const SONAME: &str = "libucp.so.0";

impl Ucp {
    /// Opens libucp from `dir`, or from where the dynamic linker looks for it. The library then stays in the process:
    /// it starts threads and installs handlers that must not lose their code.
    ///
    /// # Errors
    /// The dynamic linker's own words when the library, one it depends on, or a function in it is not found.
    pub fn open(dir: Option<&Path>) -> Result<Self, Error> {
        let file = dir.map_or_else(|| SONAME.into(), |dir| dir.join(SONAME));
        // SAFETY: libucp's constructors set up its own state only; NODELETE keeps its code mapped after this handle goes.
        // Functions of libucs are found through the same handle, as libucp depends on it.
        unsafe {
            let library = Library::open(Some(file), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NODELETE)?;
            Self::from_library(library)
        }
    }

    /// The library's own (major, minor, release) numbers, which need not be those of the headers.
    pub fn version(&self) -> (u32, u32, u32) {
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: three valid places to write to.
        unsafe { self.ucp_get_version(&raw mut major, &raw mut minor, &raw mut release) };
        (major, minor, release)
    }
}
