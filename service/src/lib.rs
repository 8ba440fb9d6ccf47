//! What every daemon shares: configuration, telemetry, signals, drain.
