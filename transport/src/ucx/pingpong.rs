//! What UCX itself needs for a round trip: one plain UCP worker at each end, no frames, credits, order, checks or sleep.
//! The limit that benchmarks hold [`super::UcxTransport`] against. Each end writes what it sends and receives into a buffer
//! of its own, as anybody who computes on it must.

use std::cell::RefCell;
use std::ffi::c_void;
use std::time::{Duration, Instant};

use ucx_sys as sys;

use super::UcxOptions;
use super::library::{Context, UcxError, check};

/// Bytes of a message's header, at the start of which is the wanted answer's body length.
pub const HEAD_BYTES: usize = 64;
/// Progress calls between two looks at the clock.
const LOOK_EVERY: u32 = 4096;
const AM_MESSAGE: u32 = 1;

/// A message as the callback leaves it.
#[derive(Default)]
struct Arrived {
    /// The body; its length is the largest that is taken.
    buffer: Vec<u8>,
    /// The body's length once a message is here.
    bytes: Option<usize>,
    /// The answer's length that the header asks for.
    wanted: usize,
}

/// One end.
pub struct Pingpong {
    worker: sys::ucp_worker_h,
    endpoint: sys::ucp_ep_h,
    context: Context,
    arrived: Box<RefCell<Arrived>>,
    source: Vec<u8>,
    sent: Vec<u8>,
}

// SAFETY: handles without ties to a thread, used through `&mut self` alone; the callback runs inside those calls.
unsafe impl Send for Pingpong {}

impl Pingpong {
    /// An end for bodies of at most `body_bytes_max`.
    ///
    /// # Errors
    /// What UCX refuses.
    pub fn new(options: &UcxOptions, body_bytes_max: usize) -> Result<Self, UcxError> {
        let context = Context::new(options)?;
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let params: sys::ucp_worker_params_t = unsafe { std::mem::zeroed() };
        let mut worker: sys::ucp_worker_h = std::ptr::null_mut();
        // SAFETY: a live context, and parameters that outlive the call.
        let status = unsafe { context.ucp.ucp_worker_create(context.raw, &raw const params, &raw mut worker) };
        check(&context.ucp, "ucp_worker_create", status)?;
        let arrived = Arrived { buffer: vec![0; body_bytes_max], ..Arrived::default() };
        let end = Self {
            worker,
            endpoint: std::ptr::null_mut(),
            context,
            arrived: Box::new(RefCell::new(arrived)),
            source: (0..body_bytes_max).map(|at| at as u8).collect(),
            sent: vec![0; body_bytes_max],
        };
        use sys::ucp_am_handler_param_field as field;
        let fields = field::UCP_AM_HANDLER_PARAM_FIELD_ID
            | field::UCP_AM_HANDLER_PARAM_FIELD_CB
            | field::UCP_AM_HANDLER_PARAM_FIELD_ARG
            | field::UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
        let param = sys::ucp_am_handler_param_t {
            field_mask: u64::from(fields.0),
            id: AM_MESSAGE,
            flags: sys::ucp_am_cb_flags::UCP_AM_FLAG_WHOLE_MSG.0,
            cb: Some(on_message),
            arg: (&raw const *end.arrived).cast_mut().cast(),
        };
        // SAFETY: the callback has the C type, and its argument is boxed and freed after the worker (see `Drop`).
        let status = unsafe { end.context.ucp.ucp_worker_set_am_recv_handler(worker, &raw const param) };
        check(&end.context.ucp, "ucp_worker_set_am_recv_handler", status).map(|()| end)
    }

    /// What the other end connects to.
    ///
    /// # Errors
    /// What UCX refuses.
    pub fn address(&self) -> Result<Vec<u8>, UcxError> {
        let mut address: *mut sys::ucp_address_t = std::ptr::null_mut();
        let mut bytes = 0_usize;
        // SAFETY: a live worker and two places to write to.
        let status = unsafe { self.context.ucp.ucp_worker_get_address(self.worker, &raw mut address, &raw mut bytes) };
        check(&self.context.ucp, "ucp_worker_get_address", status)?;
        // SAFETY: on success, `bytes` readable bytes until they are released below.
        let copy = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), bytes) }.to_vec();
        // SAFETY: got from this worker above, released once.
        unsafe { self.context.ucp.ucp_worker_release_address(self.worker, address) };
        Ok(copy)
    }

    /// Makes the way to the end whose [`Self::address`] this is. Only what a process of the same run printed may be given.
    ///
    /// # Errors
    /// What UCX refuses.
    pub fn connect(&mut self, address: &[u8]) -> Result<(), UcxError> {
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut params: sys::ucp_ep_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(sys::ucp_ep_params_field::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS.0);
        params.address = address.as_ptr().cast();
        // SAFETY: an address that a worker gave, which outlives the call.
        let status = unsafe { self.context.ucp.ucp_ep_create(self.worker, &raw const params, &raw mut self.endpoint) };
        check(&self.context.ucp, "ucp_ep_create", status)
    }

    /// Sends `ask` bytes, freshly written, and returns when `answer` bytes have come back. False: nothing for `patience`, or
    /// not connected.
    ///
    /// # Errors
    /// What UCX refuses.
    pub fn round_trip(&mut self, ask: usize, answer: usize, patience: Duration) -> Result<bool, UcxError> {
        self.send(ask, answer, patience)?;
        Ok(self.take(patience)?.is_some_and(|(bytes, _)| bytes == answer))
    }

    /// Answers one message with as many bytes as it asks for, copied out of what came. False: nothing came for `patience`.
    ///
    /// # Errors
    /// What UCX refuses.
    pub fn answer(&mut self, patience: Duration) -> Result<bool, UcxError> {
        let Some((bytes, wanted)) = self.take(patience)? else { return Ok(false) };
        let arrived = self.arrived.borrow();
        let copied = bytes.min(wanted);
        self.source[..copied].copy_from_slice(&arrived.buffer[..copied]);
        drop(arrived);
        self.send(wanted, 0, patience)
    }

    fn send(&mut self, bytes: usize, wanted: usize, patience: Duration) -> Result<bool, UcxError> {
        if self.endpoint.is_null() {
            return Ok(false);
        }
        let bytes = bytes.min(self.sent.len());
        self.sent[..bytes].copy_from_slice(&self.source[..bytes]);
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&(wanted as u64).to_le_bytes());
        let mut param = host_memory();
        // As ours does, and twice as fast within a host as the rendezvous that UCX would choose for large ones.
        param.op_attr_mask |= sys::ucp_op_attr_t::UCP_OP_ATTR_FIELD_FLAGS.0;
        param.flags = sys::ucp_send_am_flags::UCP_AM_SEND_FLAG_EAGER.0;
        // SAFETY: a live endpoint of this worker; header and body stay in place until the operation is complete, before which
        // `complete` does not return.
        let request = unsafe {
            self.context.ucp.ucp_am_send_nbx(
                self.endpoint,
                AM_MESSAGE,
                head.as_ptr().cast(),
                HEAD_BYTES,
                self.sent.as_ptr().cast(),
                bytes,
                &raw const param,
            )
        };
        self.complete("ucp_am_send_nbx", request, patience)
    }

    /// The body's length and the answer's, of the next message.
    fn take(&mut self, patience: Duration) -> Result<Option<(usize, usize)>, UcxError> {
        let here = |end: &Self| end.arrived.borrow().bytes.is_some();
        if !self.progress_until(here, patience) {
            return Ok(None);
        }
        let mut arrived = self.arrived.borrow_mut();
        Ok(Some((arrived.bytes.take().unwrap_or(0), arrived.wanted)))
    }

    /// Waits for an operation. One that does not end within `patience` ends the process: its memory cannot be given up.
    fn complete(&mut self, call: &'static str, request: *mut c_void, patience: Duration) -> Result<bool, UcxError> {
        let value = request as isize;
        if value == 0 {
            return Ok(true);
        }
        if (isize::from(sys::ucs_status_t::UCS_ERR_LAST.0)..0).contains(&value) {
            check(&self.context.ucp, call, sys::ucs_status_t(value as i8))?;
        }
        // SAFETY: a request that UCX returned and that is freed below.
        let status = |end: &Self| unsafe { end.context.ucp.ucp_request_check_status(request) };
        if !self.progress_until(|end| status(end) != sys::ucs_status_t::UCS_INPROGRESS, patience) {
            tracing::error!(
                call,
                ?patience,
                "ucx does not end an operation whose memory it may still touch: giving up"
            );
            std::process::abort();
        }
        let outcome = check(&self.context.ucp, call, status(self)).map(|()| true);
        // SAFETY: complete, and freed once.
        unsafe { self.context.ucp.ucp_request_free(request) };
        outcome
    }

    fn progress_until(&mut self, done: impl Fn(&Self) -> bool, patience: Duration) -> bool {
        let mut until = None;
        loop {
            for _ in 0..LOOK_EVERY {
                if done(self) {
                    return true;
                }
                // SAFETY: a live worker; the callback borrows only what nothing here holds.
                unsafe { self.context.ucp.ucp_worker_progress(self.worker) };
            }
            let now = Instant::now();
            if now >= *until.get_or_insert(now + patience) {
                return false;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Pingpong {
    fn drop(&mut self) {
        // SAFETY: a live worker, not used again; its endpoints go with it, and the context, a field, goes after it.
        unsafe { self.context.ucp.ucp_worker_destroy(self.worker) };
    }
}

/// The attributes of every operation: contiguous bytes in the host's memory.
fn host_memory() -> sys::ucp_request_param_t {
    // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
    let mut param: sys::ucp_request_param_t = unsafe { std::mem::zeroed() };
    param.op_attr_mask = sys::ucp_op_attr_t::UCP_OP_ATTR_FIELD_MEMORY_TYPE.0;
    param.memory_type = sys::ucs_memory_type_t::UCS_MEMORY_TYPE_HOST;
    param
}

/// UCX's callback for a message; `arg` is the end's `arrived`. A message that does not fit is dropped.
///
/// # Safety
/// Only UCX calls it, on the worker's thread, with a live `arg`.
unsafe extern "C" fn on_message(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    data: *mut c_void,
    length: usize,
    param: *const sys::ucp_am_recv_param_t,
) -> sys::ucs_status_t {
    // SAFETY: `arg` is what `new` registered; `param` is valid during the callback.
    let (arrived, attr) = unsafe { (&*arg.cast::<RefCell<Arrived>>(), (*param).recv_attr) };
    let Ok(mut arrived) = arrived.try_borrow_mut() else { return sys::ucs_status_t::UCS_OK };
    let rendezvous = attr & u64::from(sys::ucp_am_recv_attr_t::UCP_AM_RECV_ATTR_FLAG_RNDV.0) != 0;
    if header_length != HEAD_BYTES || length > arrived.buffer.len() || arrived.bytes.is_some() || rendezvous {
        return sys::ucs_status_t::UCS_OK;
    }
    // SAFETY: `header_length` readable bytes, which are more than eight.
    arrived.wanted = unsafe { header.cast::<u64>().read_unaligned() } as usize;
    arrived.bytes = Some(length);
    if length > 0 {
        // SAFETY: without the rendezvous flag, `data` is `length` readable bytes for the length of the callback.
        arrived.buffer[..length].copy_from_slice(unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length) });
    }
    sys::ucs_status_t::UCS_OK
}
