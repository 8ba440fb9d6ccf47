//! The mesh's closed set of error codes, and the one mapping between them and a gRPC status.
//!
//! A status carries an encoded [`v1::ErrorDetail`] in its details, so that the typed error survives any number of hops.

use prost::Message;
use tonic::{Code as GrpcCode, Status};

use crate::v1;

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The request can never be served; `field` says which part.
    InvalidRequest,
    /// Prompt and output exceed the context.
    ContextExceeded,
    /// Refused at admission; try again later.
    Overloaded,
    /// The mesh has no view yet, or lost the capacity to serve.
    NotServing,
    /// A node that the request needed is gone or silent.
    NodeLost,
    /// The deadline passed.
    Deadline,
    /// Another model, dtype or compute kind than the mesh's.
    ModelMismatch,
    /// Another version or frame protocol than the mesh's.
    VersionMismatch,
    /// Another node has the slot.
    SlotTaken,
    /// A defect of ours.
    Internal,
}

/// Every code with its name on the wire and the gRPC code above it: the only place where they meet.
const CODES: [(Code, v1::ErrorCode, GrpcCode); 10] = [
    (Code::InvalidRequest, v1::ErrorCode::InvalidRequest, GrpcCode::InvalidArgument),
    (Code::ContextExceeded, v1::ErrorCode::ContextExceeded, GrpcCode::InvalidArgument),
    (Code::Overloaded, v1::ErrorCode::Overloaded, GrpcCode::ResourceExhausted),
    (Code::NotServing, v1::ErrorCode::NotServing, GrpcCode::Unavailable),
    (Code::NodeLost, v1::ErrorCode::NodeLost, GrpcCode::Unavailable),
    (Code::Deadline, v1::ErrorCode::Deadline, GrpcCode::DeadlineExceeded),
    (Code::ModelMismatch, v1::ErrorCode::ModelMismatch, GrpcCode::FailedPrecondition),
    (Code::VersionMismatch, v1::ErrorCode::VersionMismatch, GrpcCode::FailedPrecondition),
    (Code::SlotTaken, v1::ErrorCode::SlotTaken, GrpcCode::AlreadyExists),
    (Code::Internal, v1::ErrorCode::Internal, GrpcCode::Internal),
];

impl Code {
    fn row(self) -> &'static (Code, v1::ErrorCode, GrpcCode) {
        CODES.iter().find(|(code, _, _)| *code == self).expect("the table has every code, which a test holds")
    }

    /// The code as it travels.
    pub fn wire(self) -> v1::ErrorCode {
        self.row().1
    }

    /// The gRPC code that it travels under.
    pub fn grpc(self) -> GrpcCode {
        self.row().2
    }

    /// The code's name in the contracts, such as `OVERLOADED`.
    pub fn name(self) -> &'static str {
        self.wire().as_str_name().trim_start_matches("ERROR_CODE_")
    }

    /// The code of a wire number; `None` for one that this version does not know.
    pub fn from_wire(code: i32) -> Option<Self> {
        CODES.iter().find(|(_, wire, _)| *wire as i32 == code).map(|(code, _, _)| *code)
    }

    /// What a status without details says: an error of gRPC itself or of something between.
    fn from_grpc(code: GrpcCode) -> Self {
        match code {
            GrpcCode::InvalidArgument | GrpcCode::OutOfRange => Code::InvalidRequest,
            GrpcCode::ResourceExhausted => Code::Overloaded,
            GrpcCode::Unavailable => Code::NodeLost,
            GrpcCode::DeadlineExceeded | GrpcCode::Cancelled => Code::Deadline,
            GrpcCode::FailedPrecondition => Code::ModelMismatch,
            GrpcCode::AlreadyExists => Code::SlotTaken,
            _ => Code::Internal,
        }
    }
}

/// An error as every service of the mesh reports it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.name())]
pub struct MeshError {
    /// Which of the closed set.
    pub code: Code,
    /// For people: what happened and what to do about it.
    pub message: String,
    /// The request's field at fault; empty when there is none.
    pub field: String,
    /// The node at fault; empty when there is none.
    pub node: String,
}

impl MeshError {
    /// An error with neither field nor node.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: String::new(), node: String::new() }
    }

    /// A request that can never be served, because of `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message).at_field(field)
    }

    /// Names the request's field at fault.
    #[must_use]
    pub fn at_field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// Names the node at fault.
    #[must_use]
    pub fn at_node(mut self, node: impl Into<String>) -> Self {
        self.node = node.into();
        self
    }

    /// The error that a status carries. A status without details (from gRPC itself) gets the nearest code.
    pub fn from_status(status: &Status) -> Self {
        let detail = Self::detail(status);
        detail.unwrap_or_else(|| Self::new(Code::from_grpc(status.code()), status.message()))
    }

    /// The error in a status' details, if one of ours made it.
    pub fn detail(status: &Status) -> Option<Self> {
        if status.details().is_empty() {
            return None;
        }
        let v1::ErrorDetail { code, message, field, node } = v1::ErrorDetail::decode(status.details()).ok()?;
        Some(Self { code: Code::from_wire(code)?, message, field, node })
    }
}

impl From<MeshError> for Status {
    fn from(error: MeshError) -> Self {
        let MeshError { code, message, field, node } = error;
        let detail = v1::ErrorDetail { code: code.wire() as i32, message: message.clone(), field, node };
        Status::with_details(code.grpc(), message, detail.encode_to_vec().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_code_of_the_contract_but_unspecified_has_exactly_one_row() {
        let known: Vec<v1::ErrorCode> = (1..=CODES.len() as i32).map(|i| v1::ErrorCode::try_from(i).unwrap()).collect();
        assert_eq!(CODES.map(|(_, wire, _)| wire).to_vec(), known);
        assert!(v1::ErrorCode::try_from(CODES.len() as i32 + 1).is_err(), "the contract has a code without a row");
        for (code, wire, grpc) in CODES {
            assert_eq!((code.wire(), code.grpc(), Code::from_wire(wire as i32)), (wire, grpc, Some(code)));
        }
        assert_eq!(Code::from_wire(0), None);
    }

    #[test]
    fn an_error_survives_its_way_through_a_status() {
        for (code, _, grpc) in CODES {
            let error = MeshError::new(code, "what and why").at_field("sampling.top_p").at_node("node-7");
            let status = Status::from(error.clone());
            assert_eq!(status.code(), grpc);
            assert_eq!(status.message(), "what and why");
            assert_eq!(MeshError::from_status(&status), error);
        }
    }

    #[test]
    fn a_status_of_grpc_itself_gets_the_nearest_code() {
        let error = MeshError::from_status(&Status::unavailable("connection refused"));
        assert_eq!(error, MeshError::new(Code::NodeLost, "connection refused"));
        assert_eq!(error.to_string(), "NODE_LOST: connection refused");
        assert_eq!(MeshError::from_status(&Status::unknown("?")).code, Code::Internal);
    }

    proptest! {
        #[test]
        fn garbage_details_never_panic(details in proptest::collection::vec(any::<u8>(), 0..200), code in 0i32..17) {
            let status = Status::with_details(GrpcCode::from_i32(code), "m", details.into());
            prop_assert!(!MeshError::from_status(&status).code.name().is_empty());
        }
    }
}
