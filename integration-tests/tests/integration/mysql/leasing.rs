//! Leases in the database follow the rules of `LeaseTable`.

use outbox_core::store::Release;

use super::*;

on_both! {
    async fn a_lane_is_taken_renewed_and_given_back(lab: Lab) -> Result<()> {
        let (worker, lease) = lab.take(Lane(2)).await?;
        assert_eq!(lease.epoch, 1);
        let before = lab.store.keep_leases(KeepLeases::new(worker, TTL)).await?;
        let renewed =
            lab.store.keep_leases(KeepLeases::new(worker, TTL).renew(&[lease])).await?;
        assert!(renewed.lanes[2].stamp > before.lanes[2].stamp);
        assert_eq!(renewed.lanes[2].ttl, TTL);
        assert!(!renewed.lanes[2].expired);
        assert_eq!(renewed.lanes.len(), 4);
        assert_eq!(renewed.workers.len(), 1);
        let other = WorkerId::generate();
        lab.store.release(Release::new(other, &[lease])).await?;
        let standing = lab.store.keep_leases(KeepLeases::new(other, TTL)).await?;
        assert_eq!(standing.lanes[2].owner, Some(worker));
        lab.store.release(Release::new(worker, &[lease]).leaving()).await?;
        let standing = lab.store.keep_leases(KeepLeases::new(other, TTL)).await?;
        assert_eq!((standing.lanes[2].owner, standing.lanes[2].epoch), (None, 1));
        assert_eq!(standing.workers.len(), 1);
        Ok(())
    }
}
