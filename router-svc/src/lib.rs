//! The front door and control plane of the mesh.
