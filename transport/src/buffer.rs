//! The bounded window that frames are built and read in.
