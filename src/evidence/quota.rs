//! How much room a case gets. Pure.
//!
//! No case makes room for another one: if it did, a container could have the evidence of another
//! incident removed by being attacked often enough. So a full store refuses. That one workload
//! cannot fill it, each has a share; and rules leave room for one case that a user takes.

/// What is used, and what may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quota {
    /// `evidence.max_bytes` and `evidence.max_case_bytes`.
    pub(super) of_all: u64,
    pub(super) of_case: u64,
    /// What all cases take, those of the same workload, and the case itself if it is there.
    pub(super) used: u64,
    pub(super) by_workload: u64,
    pub(super) by_case: u64,
}

/// One workload may fill this part of the store by rules.
const SHARE: u64 = 4;
/// With less room than this, nothing is begun.
const LEAST: u64 = 256 << 10;

impl Quota {
    /// How many bytes may be added to the case. The error is for people.
    pub(super) fn room(&self, by_rule: bool) -> Result<u64, String> {
        let Quota { of_all, of_case, used, by_workload, by_case } = *self;
        let mut room = vec![
            (of_all.saturating_sub(used), "the store is full (evidence.max_bytes)"),
            (of_case.saturating_sub(by_case), "the case is full (evidence.max_case_bytes)"),
        ];
        if by_rule {
            let reserve = of_case.min(of_all / SHARE);
            room.push((
                of_all.saturating_sub(reserve).saturating_sub(used),
                "the store is full, but for what users take (evidence.max_bytes)",
            ));
            let share = (of_all / SHARE).max(of_case.min(of_all));
            room.push((
                share.saturating_sub(by_workload),
                "the workload has its share of the store (a quarter of evidence.max_bytes)",
            ));
        }
        let (room, why) = room.into_iter().min_by_key(|(room, _)| *room).unwrap_or_default();
        if room < LEAST {
            return Err(format!(
                "{why}: nothing was taken (driftd evidence export and rm make room)"
            ));
        }
        Ok(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn quota(used: u64, by_workload: u64, by_case: u64) -> Quota {
        let [used, by_workload, by_case] = [used, by_workload, by_case].map(|mib| mib * MIB);
        Quota { of_all: 400 * MIB, of_case: 50 * MIB, used, by_workload, by_case }
    }

    #[test]
    fn one_workload_cannot_fill_the_store_and_rules_leave_room_for_a_user() {
        let room = |quota: Quota, by_rule| quota.room(by_rule).map(|room| room / MIB);
        assert_eq!(room(quota(0, 0, 0), true), Ok(50));
        assert_eq!(room(quota(10, 10, 10), true), Ok(40), "what is there counts");
        assert_eq!(room(quota(90, 90, 0), true), Ok(10), "its share is a hundred");
        assert!(room(quota(100, 100, 0), true).unwrap_err().contains("share"));
        assert_eq!(room(quota(100, 100, 0), false), Ok(50), "a user may go on");
        assert_eq!(room(quota(100, 0, 0), true), Ok(50), "and so may another workload");
        assert!(room(quota(350, 0, 0), true).unwrap_err().contains("but for what users take"));
        assert_eq!(room(quota(350, 0, 0), false), Ok(50));
        assert!(room(quota(400, 0, 0), false).unwrap_err().contains("evidence.max_bytes"));
        assert!(room(quota(50, 50, 50), true).unwrap_err().contains("evidence.max_case_bytes"));
        assert!(room(quota(500, 0, 0), false).is_err(), "a smaller limit than before");
    }
}
