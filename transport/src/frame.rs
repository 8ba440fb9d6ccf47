//! The data plane's only message: a fixed header, then (on dispatch) row metadata, then rows.
