//! The one loop that owns driftd's mutable state.
