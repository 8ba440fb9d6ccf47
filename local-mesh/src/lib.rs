//! Every role of a mesh assembled in one process.
