//! Everything that is promised of a running mesh, by behaviour. Meshes are real processes, started by `meshctl up`.

mod advertise;
mod bad_frames;
mod bad_input;
mod changes;
mod dependencies;
mod drills;
mod faults;
mod goldens;
mod invariance;
mod processes;
mod streams;
