//! Provisioning of real servers, and the end-to-end tests on them.
