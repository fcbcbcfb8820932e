//! Certificates for servers that encrypt, from an authority that only one test trusts.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// A certificate authority of the test's own.
#[derive(Debug)]
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a server proves itself by, in PEM text.
#[derive(Debug, Clone)]
pub struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    /// A new one, with a key that nobody else has.
    ///
    /// # Errors
    ///
    /// When the machine has no random numbers.
    pub fn new() -> Result<Self> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Another name than that of what it signs, which would otherwise look self-signed.
        authority.distinguished_name.push(DnType::CommonName, "authority of one test");
        let key = KeyPair::generate()?;
        let certificate = authority.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(authority, key) })
    }

    /// Its certificate in PEM text, for clients to trust.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.certificate
    }

    /// An identity for a server on this machine.
    ///
    /// # Errors
    ///
    /// When the machine has no random numbers.
    pub fn identity(&self) -> Result<Identity> {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(names)?.signed_by(&key, &self.issuer)?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}
