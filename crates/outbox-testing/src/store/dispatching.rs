//! The dispatcher's side.

use async_trait::async_trait;
use outbox_core::Store;
use outbox_core::store::{
    Backlog, Claim, ClaimReply, KeepLeases, Purge, Release, Settle, Settled, Standing, StoreError,
    StoreProfile,
};

use super::MemoryStore;

#[async_trait]
impl Store for MemoryStore {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        Ok(self.lock().profile())
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        Ok(self.lock().keep_leases(&request, self.now()))
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        Ok(self.lock().claim(&request, self.now()))
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        Ok(self.lock().settle(&request, self.now()))
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        self.lock().release(&request, self.now());
        Ok(())
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        Ok(self.lock().purge(request, self.now()))
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        Ok(self.lock().backlog(self.now()))
    }
}
