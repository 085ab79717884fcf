//! What the C library's allocator keeps of the memory that driftd has freed. Other libraries than
//! glibc keep little.

/// Threads share a few areas. By default there are eight for each processor, and each keeps what
/// was freed in it for its own threads.
#[cfg(target_env = "gnu")]
const AREAS: libc::c_int = 4;

/// Limits what is kept. Before any thread is started.
pub fn share_areas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number in the allocator.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, AREAS) };
}

/// Gives the kernel back what was freed.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator locks each area while it does this.
    let _ = unsafe { libc::malloc_trim(0) };
}
