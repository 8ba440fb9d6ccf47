//! The UCX library of this process: opened once, asked what it can do.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ucx_sys as sys;

use super::UcxOptions;

/// The one library that this process opened. Two different libucp in one process would share their dependencies by name and
/// corrupt each other, so the first is kept.
static OPENED: Mutex<Option<Opened>> = Mutex::new(None);

struct Opened {
    dir: Option<PathBuf>,
    ucp: Arc<sys::Ucp>,
}

/// Why UCX cannot be used, or a call into it failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum UcxError {
    /// The library cannot be opened.
    #[error(
        "cannot open {}: {reason}; install UCX (Debian: libucx0) or put its folder into LD_LIBRARY_PATH",
        sys::SONAME
    )]
    NotFound {
        /// The dynamic linker's words.
        reason: String,
    },
    /// Another folder was named when this process opened UCX first.
    #[error("UCX is already open from {open:?} and cannot be opened from {asked:?} too: name one folder per process")]
    OtherFolder {
        /// Where it was opened.
        open: Option<PathBuf>,
        /// Where it was to be opened.
        asked: Option<PathBuf>,
    },
    /// An option cannot be passed on.
    #[error("UCX does not accept {option} = {value:?}: {reason}; see `ucx_info -d` for what there is")]
    Option {
        /// Its name.
        option: &'static str,
        /// What it was to be.
        value: String,
        /// UCX's words.
        reason: String,
    },
    /// UCX does not get what it needs to begin.
    #[error(
        "UCX cannot set its queues up: {reason}; give /dev/shm some megabytes more (docker run --shm-size), or leave \
         shared memory out (UCX_TLS=tcp,self)"
    )]
    NoWorker {
        /// UCX's words.
        reason: String,
    },
    /// Memory to be shared, or that a peer shares, cannot be used.
    #[error("cannot share {bytes} bytes of memory: {reason}")]
    NoMemory {
        /// How much.
        bytes: usize,
        /// Why.
        reason: String,
    },
    /// A call failed.
    #[error("{call} failed: {reason} ({code})")]
    Call {
        /// Which.
        call: &'static str,
        /// UCX's words.
        reason: String,
        /// UCX's status.
        code: i8,
    },
}

impl UcxError {
    /// Whether it says that the peer is gone rather than that something is wrong here.
    pub fn is_peer_gone(&self) -> bool {
        use sys::ucs_status_t as status;
        let UcxError::Call { code, .. } = *self else { return false };
        let gone = [
            status::UCS_ERR_CONNECTION_RESET,
            status::UCS_ERR_NOT_CONNECTED,
            status::UCS_ERR_REJECTED,
            status::UCS_ERR_CANCELED,
        ];
        let failures = status::UCS_ERR_LAST_ENDPOINT_FAILURE.0..=status::UCS_ERR_FIRST_LINK_FAILURE.0;
        failures.contains(&code) || gone.contains(&sys::ucs_status_t(code))
    }
}

/// What [`super::probe`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UcxInfo {
    /// The library's version, as `1.13.1`.
    pub version: String,
    /// What it would move bytes with on this machine, as `posix/memory`, in UCX's own order.
    pub transports: Vec<String>,
}

/// Opens the library, or hands out the one already open.
pub fn open(dir: Option<&Path>) -> Result<Arc<sys::Ucp>, UcxError> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    match opened.as_ref() {
        Some(opened) if dir.is_none() || opened.dir.as_deref() == dir => Ok(Arc::clone(&opened.ucp)),
        Some(opened) => Err(UcxError::OtherFolder { open: opened.dir.clone(), asked: dir.map(Path::to_owned) }),
        None => {
            let ucp = sys::Ucp::open(dir).map_err(|error| UcxError::NotFound { reason: words_of(&error) })?;
            quieten(&ucp);
            let ucp = Arc::new(ucp);
            *opened = Some(Opened { dir: dir.map(Path::to_owned), ucp: Arc::clone(&ucp) });
            Ok(ucp)
        }
    }
}

/// Keeps UCX from printing to standard output whatever happens to a peer: all of it comes back as statuses, and is told of
/// by name. Whoever sets UCX_LOG_LEVEL gets what it says.
fn quieten(ucp: &sys::Ucp) {
    if std::env::var_os("UCX_LOG_LEVEL").is_some() {
        return;
    }
    // SAFETY: two nul-terminated strings, which are parsed and not kept; nothing else uses the library yet.
    let status = unsafe { ucp.ucs_global_opts_set_value(c"LOG_LEVEL".as_ptr(), c"fatal".as_ptr()) };
    if let Err(error) = check(ucp, "ucs_global_opts_set_value", status) {
        tracing::debug!(%error, "ucx will print its own messages");
    }
}

/// The dynamic linker's own message rather than "dlopen failed".
fn words_of(error: &sys::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// `status` as a result naming `call`.
pub fn check(ucp: &sys::Ucp, call: &'static str, status: sys::ucs_status_t) -> Result<(), UcxError> {
    if status == sys::ucs_status_t::UCS_OK {
        return Ok(());
    }
    Err(UcxError::Call { call, reason: status_words(ucp, status), code: status.0 })
}

/// UCX's words for `status`.
pub fn status_words(ucp: &sys::Ucp, status: sys::ucs_status_t) -> String {
    // SAFETY: returns a string of static lifetime for every value, known or not.
    let words = unsafe { ucp.ucs_status_string(status) };
    if words.is_null() {
        return "unknown status".to_owned();
    }
    // SAFETY: not null, and nul-terminated by the function's contract.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

/// What is set beside what the user set, unless the variable `UCX_` and the name says otherwise.
///
/// Shared memory says that it can handle a peer's death, which it can and by default hides. Endpoints that want this
/// handled are the only ones that are gone when they are closed: others keep the memory that a dead peer shared for as long
/// as the worker lives (`ucp_ep_disconnected`). 1.13 knows the option by its family's name, later versions by the transport's
/// too.
///
/// Its queues hold 256 messages, 2 MiB, as they do by default in later versions, where 1.13 has 64: a body that does not fit goes
/// on when the peer has looked, and both have less to do meanwhile.
const OPTIONS: [(&str, &str); 4] =
    [("MM_ERROR_HANDLING", "y"), ("POSIX_ERROR_HANDLING", "y"), ("MM_FIFO_SIZE", "256"), ("POSIX_FIFO_SIZE", "256")];

// SAFETY: a handle without ties to a thread, of a context that is set up for several threads (see `init`).
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A UCP context: the library set up with our options.
pub struct Context {
    /// The functions.
    pub ucp: Arc<sys::Ucp>,
    /// The C object.
    pub raw: sys::ucp_context_h,
}

impl Context {
    /// Sets UCX up for active messages and sleeping waits.
    pub fn new(options: &UcxOptions) -> Result<Self, UcxError> {
        let ucp = open(options.library_dir.as_deref())?;
        let mut config: *mut sys::ucp_config_t = std::ptr::null_mut();
        // SAFETY: reads the UCX_* environment into a fresh object, which is released below on every path.
        let status = unsafe { ucp.ucp_config_read(std::ptr::null(), std::ptr::null(), &raw mut config) };
        check(&ucp, "ucp_config_read", status)?;
        let tls = options.tls.as_deref().map(|tls| ("TLS", tls));
        let ours = OPTIONS.into_iter().filter(|(name, _)| std::env::var_os(format!("UCX_{name}")).is_none());
        let context = tls
            .into_iter()
            .chain(ours)
            .try_for_each(|(name, value)| set_option(&ucp, config, name, value))
            .and_then(|()| init(&ucp, config))
            .map_err(|error| match (error, options.tls.as_ref()) {
                // With a list of transports given, it is the list that finds no device.
                (UcxError::Call { reason, .. }, Some(tls)) => {
                    UcxError::Option { option: "TLS", value: tls.clone(), reason }
                }
                (error, _) => error,
            });
        // SAFETY: made by ucp_config_read above and not used again; ucp_init_version copied what it needs.
        unsafe { ucp.ucp_config_release(config) };
        Ok(Self { raw: context?, ucp })
    }

    /// The devices that UCX found, out of what it prints about a context.
    pub fn transports(&self) -> Vec<String> {
        let printed = printed_by(|stream| {
            // SAFETY: a live context and a live stream.
            unsafe { self.ucp.ucp_context_print_info(self.raw, stream) };
        });
        // As in "#  resource 1  :  md 1  dev 1  flags -- tcp/lo".
        let resources = printed.lines().filter(|line| line.trim_start_matches(['#', ' ']).starts_with("resource"));
        resources.filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by ucp_init_version; every worker of it holds this context and is gone by now.
        unsafe { self.ucp.ucp_cleanup(self.raw) };
    }
}

fn set_option(
    ucp: &sys::Ucp,
    config: *mut sys::ucp_config_t,
    option: &'static str,
    value: &str,
) -> Result<(), UcxError> {
    let refused = |reason: String| UcxError::Option { option, value: value.to_owned(), reason };
    let name = CString::new(option).map_err(|error| refused(error.to_string()))?;
    let text = CString::new(value).map_err(|error| refused(error.to_string()))?;
    // SAFETY: a live config and two nul-terminated strings, which are copied.
    let status = unsafe { ucp.ucp_config_modify(config, name.as_ptr(), text.as_ptr()) };
    check(ucp, "ucp_config_modify", status).map_err(|error| refused(error.to_string()))
}

fn init(ucp: &sys::Ucp, config: *const sys::ucp_config_t) -> Result<sys::ucp_context_h, UcxError> {
    // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
    let mut params: sys::ucp_params_t = unsafe { std::mem::zeroed() };
    let fields =
        sys::ucp_params_field::UCP_PARAM_FIELD_FEATURES | sys::ucp_params_field::UCP_PARAM_FIELD_MT_WORKERS_SHARED;
    params.field_mask = u64::from(fields.0);
    // Memory that it makes is given back by whichever thread has it last.
    params.mt_workers_shared = 1;
    params.features = u64::from((sys::ucp_feature::UCP_FEATURE_AM | sys::ucp_feature::UCP_FEATURE_WAKEUP).0);
    let mut context: sys::ucp_context_h = std::ptr::null_mut();
    // SAFETY: params and config outlive the call, and the mask names the fields that are set.
    let status = unsafe {
        ucp.ucp_init_version(sys::UCP_API_MAJOR, sys::UCP_API_MINOR, &raw const params, config, &raw mut context)
    };
    check(ucp, "ucp_init_version", status)?;
    Ok(context)
}

/// What `print` writes to a C stream, as text; empty when no stream can be had.
fn printed_by(print: impl FnOnce(*mut libc::FILE)) -> String {
    let mut text: *mut c_char = std::ptr::null_mut();
    let mut bytes = 0_usize;
    // SAFETY: two valid places, which the stream updates until it is closed.
    let stream = unsafe { libc::open_memstream(&raw mut text, &raw mut bytes) };
    if stream.is_null() {
        return String::new();
    }
    print(stream);
    // SAFETY: opened above and closed once.
    unsafe { libc::fclose(stream) };
    if text.is_null() {
        return String::new();
    }
    // SAFETY: after fclose, `text` is a nul-terminated string that is ours to free.
    let printed = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: allocated with malloc by open_memstream, freed once.
    unsafe { libc::free(text.cast::<c_void>()) };
    printed
}
