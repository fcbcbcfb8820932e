//! How the connection to the brokers is protected.

use std::fmt;

use crate::secrets;

/// How the connection to the brokers is encrypted and authenticated.
///
/// `Debug` prints names, never secrets.
#[derive(Clone, PartialEq, Eq)]
#[must_use = "security has no effect until it is given to the builder"]
pub struct Security {
    tls: bool,
    sasl: bool,
    properties: Vec<(&'static str, String)>,
}

impl Security {
    /// Nothing is encrypted. With SASL, passwords of the mechanism PLAIN cross the network as
    /// they are.
    pub fn plaintext() -> Self {
        Self { tls: false, sasl: false, properties: Vec::new() }
    }

    /// Authenticates with SASL PLAIN.
    pub fn sasl_plain(self, username: impl Into<String>, password: impl Into<String>) -> Self {
        self.sasl("PLAIN", username.into(), password.into())
    }

    fn sasl(self, mechanism: &str, username: String, password: String) -> Self {
        let mut this = self
            .with("sasl.mechanism", mechanism)
            .with("sasl.username", username)
            .with("sasl.password", password);
        this.sasl = true;
        this
    }

    fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.properties.retain(|(other, _)| *other != key);
        self.properties.push((key, value.into()));
        self
    }

    /// Whether this property of librdkafka is decided here: with a value of somebody else, a password
    /// could be sent in the clear, or other authorities be trusted.
    pub(crate) fn decides(&self, key: &str) -> bool {
        let is_ours = match key {
            "security.protocol" => self.tls || self.sasl,
            // Two names of one property.
            "sasl.mechanism" | "sasl.mechanisms" => self.sasl,
            _ if self.has("ssl.certificate.pem") && is_of_client(key) => true,
            _ => (self.tls || self.has("ssl.ca.pem")) && key.starts_with("ssl.ca."),
        };
        is_ours || self.has(key)
    }

    fn has(&self, key: &str) -> bool {
        self.properties.iter().any(|(name, _)| *name == key)
    }

    /// The properties of librdkafka.
    pub(crate) fn properties(&self) -> impl Iterator<Item = (&str, &str)> {
        let protocol = match (self.tls, self.sasl) {
            (false, false) => "plaintext",
            (false, true) => "sasl_plaintext",
            (true, false) => "ssl",
            (true, true) => "sasl_ssl",
        };
        std::iter::once(("security.protocol", protocol))
            .chain(self.properties.iter().map(|(key, value)| (*key, value.as_str())))
    }
}

/// Whether a property is about who the client is.
fn is_of_client(key: &str) -> bool {
    ["ssl.certificate.", "ssl.key.", "ssl.keystore."].iter().any(|start| key.starts_with(start))
}

/// TLS, and what librdkafka takes from OpenSSL.
#[cfg(feature = "ssl")]
#[cfg_attr(docsrs, doc(cfg(feature = "ssl")))]
impl Security {
    /// TLS with the certificate authorities of the system. The name of the broker is verified.
    pub fn tls() -> Self {
        // `probe`: also found by an OpenSSL that was linked statically.
        Self { tls: true, ..Self::plaintext() }.with("ssl.ca.location", "probe")
    }

    /// Trusts the certificate authorities in this PEM text instead of the system's.
    pub fn trust_pem(mut self, pem: impl Into<String>) -> Self {
        self.properties.retain(|(key, _)| *key != "ssl.ca.location");
        self.with("ssl.ca.pem", pem)
    }

    /// Authenticates with a client certificate and its private key, both in PEM text.
    pub fn client_pem(self, certificate: impl Into<String>, key: impl Into<String>) -> Self {
        self.with("ssl.certificate.pem", certificate).with("ssl.key.pem", key)
    }

    /// The password of the private key.
    pub fn client_key_password(self, password: impl Into<String>) -> Self {
        self.with("ssl.key.password", password)
    }

    /// Authenticates with SASL SCRAM-SHA-256.
    pub fn scram_sha_256(self, username: impl Into<String>, password: impl Into<String>) -> Self {
        self.sasl("SCRAM-SHA-256", username.into(), password.into())
    }

    /// Authenticates with SASL SCRAM-SHA-512.
    pub fn scram_sha_512(self, username: impl Into<String>, password: impl Into<String>) -> Self {
        self.sasl("SCRAM-SHA-512", username.into(), password.into())
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.properties().map(|(key, value)| (key, secrets::printable(key, value))))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sasl_over_plaintext_is_sasl_plaintext() {
        let security = Security::plaintext().sasl_plain("alice", "s3cret");
        let properties: Vec<_> = security.properties().collect();
        assert!(properties.contains(&("security.protocol", "sasl_plaintext")));
        assert!(properties.contains(&("sasl.password", "s3cret")));
    }

    #[test]
    fn security_decides_what_it_is_about_and_nothing_else() {
        let plaintext = Security::plaintext();
        let sasl = plaintext.clone().sasl_plain("alice", "s3cret");
        for key in ["security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.password"] {
            assert!(!plaintext.decides(key), "{key}");
            assert!(sasl.decides(key), "{key}");
        }
        assert!(!sasl.decides("ssl.ca.location") && !sasl.decides("client.rack"));
    }

    #[cfg(feature = "ssl")]
    #[test]
    fn tls_decides_whom_to_trust() {
        let tls = Security::tls();
        for key in ["ssl.ca.location", "ssl.ca.pem", "ssl.ca.certificate.stores"] {
            assert!(tls.decides(key), "{key}");
        }
        let client = tls.clone().client_pem("certificate", "key");
        for key in ["ssl.certificate.location", "ssl.key.location", "ssl.keystore.location"] {
            assert!(client.decides(key) && !tls.decides(key), "{key}");
        }
        assert!(!client.decides("ssl.cipher.suites"));
    }

    #[test]
    fn debug_prints_no_secret() {
        let security = Security::plaintext().sasl_plain("alice", "s3cret");
        assert!(!format!("{security:?}").contains("s3cret"));
        assert!(!format!("{security:?}").contains("alice"));
    }

    #[cfg(feature = "ssl")]
    #[test]
    fn own_authorities_replace_those_of_the_system() {
        let security = Security::tls().trust_pem("PEM").scram_sha_512("user", "s3cret");
        let keys: Vec<_> = security.properties().map(|(key, _)| key).collect();
        assert!(keys.contains(&"ssl.ca.pem") && !keys.contains(&"ssl.ca.location"));
        assert_eq!(security.properties().next(), Some(("security.protocol", "sasl_ssl")));
    }
}
