//! The gRPC contracts and their conversion to and from core types.
