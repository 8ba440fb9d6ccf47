//! A UCP worker: the one place that talks to UCX on the data path. Buffers are moved into an operation and come back
//! when UCX is done with them, so no caller can free memory that UCX or a peer may still touch.

use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ucx_sys as sys;

use super::channel::Sending;
use super::inbox::{self, AM_ACK, AM_FRAME, AM_LENT, AM_UNREACHABLE, HEAD_BYTES, Inbox, Token};
use super::lend::{Borrowed, Fetched, KEY_BYTES_MAX, PLACE_BYTES};
use super::library::{Context, UcxError, check, status_words};

/// How long a worker that goes waits for what it still has under way.
const DRAIN_MAX: Duration = Duration::from_millis(50);

/// The header of a message under way: UCX reads it until the message is sent, so it may not move.
type Head = Box<[u8; HEAD_BYTES_MAX]>;

/// Bytes of the longest header: that of a frame whose body is lent.
const HEAD_BYTES_MAX: usize = HEAD_BYTES + KEY_BYTES_MAX;

/// An operation that owns its memory until UCX is done.
struct Op {
    request: *mut c_void,
    channel: Token,
    head: Option<Head>,
    frame: Option<Sending>,
}

/// An operation that UCX is done with.
#[derive(Debug)]
pub struct Finished {
    /// Whose.
    pub channel: Token,
    /// A frame of which not all has been sent.
    pub frame: Option<Sending>,
    /// How it went.
    pub outcome: Result<(), UcxError>,
}

/// One direction of a channel, towards the peer.
#[derive(Debug)]
pub struct Endpoint {
    raw: sys::ucp_ep_h,
    /// Bytes of a body in one message, at most.
    part_bytes: usize,
    /// What of the peer's memory is attached.
    borrowed: Borrowed,
}

// SAFETY: a handle without ties to a thread, that only the worker's owner passes back to UCX.
unsafe impl Send for Endpoint {}

impl Endpoint {
    /// What the endpoint is called in [`Inbox::take_failed`].
    pub fn address(&self) -> usize {
        self.raw as usize
    }
}

/// The worker, its context and what it has under way.
pub struct Worker {
    raw: sys::ucp_worker_h,
    context: Arc<Context>,
    inbox: Box<Inbox>,
    ops: Vec<Op>,
    /// Heads to use again.
    #[allow(clippy::vec_box)]
    spare_heads: Vec<Head>,
}

// SAFETY: the worker is made in serialized mode, which lets one thread after another use it; every method takes `&mut self`
// or only reads, the inbox is not handed out beyond `&self`, and UCX calls back only inside those methods. The raw pointers
// are handles without ties to a thread.
unsafe impl Send for Worker {}

impl Worker {
    /// A worker of `context` whose callbacks fill `inbox`.
    pub fn new(context: Arc<Context>, inbox: Inbox) -> Result<Self, UcxError> {
        let inbox = Box::new(inbox);
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut params: sys::ucp_worker_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(sys::ucp_worker_params_field::UCP_WORKER_PARAM_FIELD_THREAD_MODE.0);
        params.thread_mode = sys::ucs_thread_mode_t::UCS_THREAD_MODE_SERIALIZED;
        let mut raw: sys::ucp_worker_h = std::ptr::null_mut();
        // SAFETY: a live context, and parameters that outlive the call.
        let status = unsafe { context.ucp.ucp_worker_create(context.raw, &raw const params, &raw mut raw) };
        if status != sys::ucs_status_t::UCS_OK {
            return Err(UcxError::NoWorker { reason: status_words(&context.ucp, status) });
        }
        let worker = Self { raw, context, inbox, ops: Vec::new(), spare_heads: Vec::new() };
        worker.handle(AM_FRAME, inbox::on_frame)?;
        worker.handle(AM_ACK, inbox::on_head::<AM_ACK>)?;
        worker.handle(AM_LENT, inbox::on_head::<AM_LENT>)?;
        worker.handle(AM_UNREACHABLE, inbox::on_head::<AM_UNREACHABLE>)?;
        Ok(worker)
    }

    fn handle(
        &self,
        id: u32,
        callback: unsafe extern "C" fn(
            *mut c_void,
            *const c_void,
            usize,
            *mut c_void,
            usize,
            *const sys::ucp_am_recv_param_t,
        ) -> sys::ucs_status_t,
    ) -> Result<(), UcxError> {
        use sys::ucp_am_handler_param_field as field;
        let fields = field::UCP_AM_HANDLER_PARAM_FIELD_ID
            | field::UCP_AM_HANDLER_PARAM_FIELD_CB
            | field::UCP_AM_HANDLER_PARAM_FIELD_ARG
            | field::UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
        let param = sys::ucp_am_handler_param_t {
            field_mask: u64::from(fields.0),
            id,
            flags: sys::ucp_am_cb_flags::UCP_AM_FLAG_WHOLE_MSG.0,
            cb: Some(callback),
            arg: (&raw const *self.inbox).cast_mut().cast(),
        };
        // SAFETY: the callback has the C type, and its argument is boxed and outlives the worker (see `Drop`).
        let status = unsafe { self.context.ucp.ucp_worker_set_am_recv_handler(self.raw, &raw const param) };
        check(&self.context.ucp, "ucp_worker_set_am_recv_handler", status)
    }

    /// What it was made by.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What the callbacks wrote.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// What a peer needs to make an endpoint to this worker: over anything, or over the network alone.
    pub fn address(&self, network_only: bool) -> Result<Vec<u8>, UcxError> {
        use sys::ucp_worker_attr_field as field;
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut attr: sys::ucp_worker_attr_t = unsafe { std::mem::zeroed() };
        attr.field_mask = u64::from(field::UCP_WORKER_ATTR_FIELD_ADDRESS.0);
        if network_only {
            attr.field_mask |= u64::from(field::UCP_WORKER_ATTR_FIELD_ADDRESS_FLAGS.0);
            attr.address_flags = sys::ucp_worker_address_flags_t::UCP_WORKER_ADDRESS_FLAG_NET_ONLY.0;
        }
        // SAFETY: a live worker, and a place to write to whose mask names what it asks for.
        let status = unsafe { self.context.ucp.ucp_worker_query(self.raw, &raw mut attr) };
        check(&self.context.ucp, "ucp_worker_query", status)?;
        // SAFETY: on success, so many readable bytes until they are released below.
        let copy = unsafe { std::slice::from_raw_parts(attr.address.cast::<u8>(), attr.address_length) }.to_vec();
        // SAFETY: got from this worker above, released once.
        unsafe { self.context.ucp.ucp_worker_release_address(self.raw, attr.address) };
        Ok(copy)
    }

    /// The descriptor to sleep on once [`Self::arm`] said so.
    pub fn event_fd(&self) -> Result<RawFd, UcxError> {
        let mut fd: c_int = -1;
        // SAFETY: a live worker, a place to write to; the descriptor stays UCX's.
        let status = unsafe { self.context.ucp.ucp_worker_get_efd(self.raw, &raw mut fd) };
        check(&self.context.ucp, "ucp_worker_get_efd", status)?;
        Ok(fd)
    }

    /// Moves bytes and calls back; whether anything happened.
    pub fn progress(&mut self) -> bool {
        // SAFETY: a live worker, used by one thread as `&mut self` shows; the callbacks borrow only the inbox.
        unsafe { self.context.ucp.ucp_worker_progress(self.raw) != 0 }
    }

    /// Asks for the event descriptor to become readable at the next event. False: something happened already, progress
    /// and ask again.
    pub fn arm(&mut self) -> Result<bool, UcxError> {
        // SAFETY: a live worker.
        let status = unsafe { self.context.ucp.ucp_worker_arm(self.raw) };
        if status == sys::ucs_status_t::UCS_ERR_BUSY {
            return Ok(false);
        }
        check(&self.context.ucp, "ucp_worker_arm", status).map(|()| true)
    }

    /// An endpoint to the worker at `address`, whose death UCX reports; bodies go `part_bytes` at a time.
    pub fn connect(&mut self, address: &[u8], part_bytes: usize) -> Result<Endpoint, UcxError> {
        use sys::ucp_ep_params_field as field;
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut params: sys::ucp_ep_params_t = unsafe { std::mem::zeroed() };
        let fields = field::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
            | field::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
            | field::UCP_EP_PARAM_FIELD_ERR_HANDLER;
        params.field_mask = u64::from(fields.0);
        params.address = address.as_ptr().cast();
        // Without it a closed endpoint keeps what it shares with its peer until the worker goes.
        params.err_mode = sys::ucp_err_handling_mode_t::UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler.cb = Some(inbox::on_failed);
        params.err_handler.arg = (&raw const *self.inbox).cast_mut().cast();
        let mut raw: sys::ucp_ep_h = std::ptr::null_mut();
        // SAFETY: the address came whole from an authenticated peer's own worker and outlives the call.
        let status = unsafe { self.context.ucp.ucp_ep_create(self.raw, &raw const params, &raw mut raw) };
        check(&self.context.ucp, "ucp_ep_create", status)?;
        Ok(Endpoint { raw, part_bytes, borrowed: Borrowed::default() })
    }

    /// Sends a frame, or as much of it as UCX has room for: false if there is a rest, which comes back as
    /// [`Finished::frame`]. Its memory is the operation's until then.
    pub fn send_frame(&mut self, to: &Endpoint, channel: Token, mut frame: Sending) -> Result<bool, UcxError> {
        loop {
            let mut kept = self.spare_head();
            let (head, part) = frame.next(to.part_bytes, &mut kept[..]);
            // SAFETY: see `start`; the frame's body is the window's memory, which stays where it is when the frame moves.
            let request = unsafe { self.start(to, AM_FRAME, head, part) };
            let bytes = part.len();
            let done = self.started("ucp_am_send_nbx", request)?;
            let whole = frame.advance(bytes);
            if done {
                self.spare_heads.push(kept);
            } else {
                self.ops.push(Op { request, channel, head: Some(kept), frame: Some(frame) });
                return Ok(whole);
            }
            if whole {
                return Ok(true);
            }
        }
    }

    /// Sends a frame without its body, which the peer is to read by its key and the caller keeps until it is acknowledged. Of a
    /// memory that is `known` to the peer, the place is enough.
    pub fn lend_frame(&mut self, to: &Endpoint, channel: Token, frame: &Sending, known: bool) -> Result<(), UcxError> {
        let key = frame.key().unwrap_or_default();
        let key = &key[..if known { key.len().min(PLACE_BYTES) } else { key.len() }];
        let mut kept = self.spare_head();
        frame.head(&mut kept[..HEAD_BYTES]);
        kept[HEAD_BYTES..][..key.len()].copy_from_slice(key);
        self.send_head(to, channel, AM_LENT, kept, HEAD_BYTES + key.len())
    }

    /// Copies to `body` what a peer lends to `channel` at `key`.
    pub fn fetch(
        &mut self,
        from: &mut Endpoint,
        channel: Token,
        key: &[u8],
        body: &mut [u8],
    ) -> Result<Fetched, UcxError> {
        // SAFETY: a live endpoint of this worker, whose memories are detached by `close`.
        unsafe { from.borrowed.copy(&self.context.ucp, from.raw, key, channel, body) }
    }

    /// Gives up what of the peer's memory is attached, which must be before the endpoint or the worker goes.
    pub fn detach(&mut self, from: &mut Endpoint) {
        from.borrowed.detach(&self.context.ucp);
    }

    /// Tells the peer, by its own `token`, how many of its frames were taken.
    pub fn send_ack(&mut self, to: &Endpoint, channel: Token, token: Token, count: u64) -> Result<(), UcxError> {
        self.send_count(to, channel, AM_ACK, token, count)
    }

    /// Tells the peer, by its own `token`, that the body of frame `number` cannot be read where it is.
    pub fn send_unreachable(
        &mut self,
        to: &Endpoint,
        channel: Token,
        token: Token,
        number: u64,
    ) -> Result<(), UcxError> {
        self.send_count(to, channel, AM_UNREACHABLE, token, number)
    }

    fn send_count(&mut self, to: &Endpoint, channel: Token, id: u32, token: Token, count: u64) -> Result<(), UcxError> {
        let mut kept = self.spare_head();
        kept[..8].copy_from_slice(&token.0.to_le_bytes());
        kept[8..inbox::ACK_BYTES].copy_from_slice(&count.to_le_bytes());
        self.send_head(to, channel, id, kept, inbox::ACK_BYTES)
    }

    /// Sends a message that is all header: the first `bytes` of `kept`.
    fn send_head(&mut self, to: &Endpoint, channel: Token, id: u32, kept: Head, bytes: usize) -> Result<(), UcxError> {
        // SAFETY: see `start`; there is no body.
        let request = unsafe { self.start(to, id, &kept[..bytes], &[]) };
        if self.started("ucp_am_send_nbx", request)? {
            self.spare_heads.push(kept);
        } else {
            self.ops.push(Op { request, channel, head: Some(kept), frame: None });
        }
        Ok(())
    }

    fn spare_head(&mut self) -> Head {
        self.spare_heads.pop().unwrap_or_else(|| Box::new([0; HEAD_BYTES_MAX]))
    }

    /// Starts an active message; what UCX returned for it.
    ///
    /// # Safety
    /// `head` and `body` are readable where they are until UCX has completed the operation: they belong to `ops` for as long
    /// as it has not.
    unsafe fn start(&self, to: &Endpoint, id: u32, head: &[u8], body: &[u8]) -> *mut c_void {
        let mut param = host_memory();
        // Never rendezvous. Within a host it copies straight out of the other process's memory, and when that process dies
        // meanwhile UCX ends this one by abort() (`cma_ep.c`, "process_vm_readv returned -1: No such process", seen with
        // 1.13): nobody may die of another's death. Without such copies (in containers, that is) a rendezvous of 1.13 over
        // shared memory comes to no end.
        param.op_attr_mask |= sys::ucp_op_attr_t::UCP_OP_ATTR_FIELD_FLAGS.0;
        param.flags = sys::ucp_send_am_flags::UCP_AM_SEND_FLAG_EAGER.0;
        // SAFETY: a live endpoint of this worker, parameters that outlive the call, and the caller's promise.
        unsafe {
            self.context.ucp.ucp_am_send_nbx(
                to.raw,
                id,
                head.as_ptr().cast(),
                head.len(),
                body.as_ptr().cast(),
                body.len(),
                &raw const param,
            )
        }
    }

    /// Closes an endpoint without waiting; what is under way on it is cancelled.
    pub fn close(&mut self, mut endpoint: Endpoint, channel: Token) -> Result<(), UcxError> {
        self.detach(&mut endpoint);
        // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
        let mut param: sys::ucp_request_param_t = unsafe { std::mem::zeroed() };
        param.op_attr_mask = sys::ucp_op_attr_t::UCP_OP_ATTR_FIELD_FLAGS.0;
        param.flags = sys::ucp_ep_close_flags_t::UCP_EP_CLOSE_FLAG_FORCE.0;
        // SAFETY: a live endpoint of this worker, not used again.
        let request = unsafe { self.context.ucp.ucp_ep_close_nbx(endpoint.raw, &raw const param) };
        if !self.started("ucp_ep_close_nbx", request)? {
            self.ops.push(Op { request, channel, head: None, frame: None });
        }
        Ok(())
    }

    /// Whether an operation is complete at once, from what UCX returned for it.
    fn started(&self, call: &'static str, request: *mut c_void) -> Result<bool, UcxError> {
        // A pointer's worth of status: null is done, the last hundred addresses are errors, others are requests.
        let value = request as isize;
        if value == 0 {
            return Ok(true);
        }
        if (isize::from(sys::ucs_status_t::UCS_ERR_LAST.0)..0).contains(&value) {
            check(&self.context.ucp, call, sys::ucs_status_t(value as i8))?;
        }
        Ok(false)
    }

    /// Operations under way.
    pub fn pending(&self) -> usize {
        self.ops.len()
    }

    /// Collects what UCX is done with.
    pub fn reap(&mut self, finished: &mut Vec<Finished>) {
        let mut at = 0;
        while at < self.ops.len() {
            // SAFETY: a request that UCX returned and that was not freed.
            let status = unsafe { self.context.ucp.ucp_request_check_status(self.ops[at].request) };
            if status == sys::ucs_status_t::UCS_INPROGRESS {
                at += 1;
                continue;
            }
            let op = self.ops.swap_remove(at);
            // SAFETY: complete, and freed once as it left `ops`.
            unsafe { self.context.ucp.ucp_request_free(op.request) };
            self.spare_heads.extend(op.head);
            let outcome = check(&self.context.ucp, "ucp_am_send_nbx", status);
            finished.push(Finished { channel: op.channel, frame: op.frame.filter(|frame| !frame.is_sent()), outcome });
        }
    }

    /// UCX's words for a status it gave a callback.
    pub fn words(&self, status: i8) -> String {
        status_words(&self.context.ucp, sys::ucs_status_t(status))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let until = Instant::now() + DRAIN_MAX;
        let mut finished = Vec::new();
        while !self.ops.is_empty() && Instant::now() < until {
            self.progress();
            self.reap(&mut finished);
            finished.clear();
        }
        for op in &self.ops {
            // SAFETY: requests that UCX returned; one that is not complete goes with the worker, right below.
            unsafe { self.context.ucp.ucp_request_free(op.request) };
        }
        // SAFETY: a live worker, not used again. The inbox and the operations' memory are fields, freed after this; the
        // context is one too, and goes after its worker.
        unsafe { self.context.ucp.ucp_worker_destroy(self.raw) };
    }
}

/// The attributes of every operation: contiguous bytes in the host's memory, which spares UCX to find out.
fn host_memory() -> sys::ucp_request_param_t {
    // SAFETY: a C struct of integers and pointers, for which zero is a valid value.
    let mut param: sys::ucp_request_param_t = unsafe { std::mem::zeroed() };
    param.op_attr_mask = sys::ucp_op_attr_t::UCP_OP_ATTR_FIELD_MEMORY_TYPE.0;
    param.memory_type = sys::ucs_memory_type_t::UCS_MEMORY_TYPE_HOST;
    param
}
