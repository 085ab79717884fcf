//! (stub)

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub pidfd: bool,
}

pub fn probe() -> Result<Capabilities, std::io::Error> {
    Ok(Capabilities { pidfd: true })
}
