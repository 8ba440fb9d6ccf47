//! Raw bindings to UCP, opened at run time.
