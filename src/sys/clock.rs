//! Whether the machine's clock was set. After that, new files can have times that are older
//! than the files are. `watch` then does not trust the times of files.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Counts how often the clock was set since this value was made.
#[derive(Debug)]
struct Settings {
    /// A timer that the kernel cancels when the clock is set, before the call that sets
    /// it returns (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`). `None` if there is no
    /// such timer.
    timer: Option<OwnedFd>,
    count: AtomicU64,
}

impl Settings {
    fn open() -> Settings {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags).ok();
        let timer = timer.filter(|timer| {
            let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
            // It never expires.
            let never = Timespec { tv_sec: 9_000_000_000, tv_nsec: 0 };
            let none = Timespec { tv_sec: 0, tv_nsec: 0 };
            let value = Itimerspec { it_interval: none, it_value: never };
            timerfd_settime(timer, flags, &value).is_ok()
        });
        Settings { timer, count: AtomicU64::new(0) }
    }

    fn count(&self) -> u64 {
        if let Some(timer) = &self.timer {
            let read = rustix::io::read(timer, &mut [0_u8; 8]);
            self.record(read.err());
        }
        self.count.load(Ordering::Acquire)
    }

    fn record(&self, err: Option<Errno>) {
        // The timer stays armed, for the next time.
        if err == Some(Errno::CANCELED) {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// How often the clock was set since the first call. If two calls return the same, the clock
/// was not set in between. Never waits.
pub fn times_set() -> u64 {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(Settings::open).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x19_a_clock_is_counted_when_it_is_set_and_not_otherwise() {
        let settings = Settings::open();
        assert!(settings.timer.is_some(), "this kernel reports when its clock is set");
        assert_eq!([settings.count(), settings.count()], [0, 0]);
        // The results of a read before and after the clock was set.
        settings.record(Some(Errno::AGAIN));
        assert_eq!(settings.count(), 0);
        settings.record(Some(Errno::CANCELED));
        assert_eq!([settings.count(), settings.count()], [1, 1]);
    }
}
