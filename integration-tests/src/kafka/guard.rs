//! Whom a cluster lets in.

use crate::tls::Identity;

/// What a node asks of its clients. Other nodes come in by another way, which stays open.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    sasl: Option<(String, String)>,
    identity: Option<Identity>,
}

impl Guard {
    /// Asks for this name and this password, by SASL PLAIN.
    #[must_use]
    pub fn sasl_plain(mut self, user: &str, password: &str) -> Self {
        self.sasl = Some((user.to_owned(), password.to_owned()));
        self
    }

    /// Speaks TLS only, as this server.
    #[must_use]
    pub fn tls(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Settings of a node, which override those that it has without a guard.
    pub(crate) fn settings(&self) -> Vec<(&'static str, String)> {
        let protocol = match (&self.sasl, &self.identity) {
            (None, None) => "PLAINTEXT",
            (None, Some(_)) => "SSL",
            (Some(_), None) => "SASL_PLAINTEXT",
            (Some(_), Some(_)) => "SASL_SSL",
        };
        let protocols = format!("CLIENTS:{protocol},BROKERS:PLAINTEXT,CONTROLLER:PLAINTEXT");
        let mut settings = vec![("listener.security.protocol.map", protocols)];
        if let Some((user, password)) = &self.sasl {
            let module = "org.apache.kafka.common.security.plain.PlainLoginModule";
            settings.extend([
                ("listener.name.clients.sasl.enabled.mechanisms", "PLAIN".to_owned()),
                (
                    "listener.name.clients.plain.sasl.jaas.config",
                    format!("{module} required user_{user}=\"{password}\";"),
                ),
            ]);
        }
        if let Some(identity) = &self.identity {
            // As one line, in the escapes of Java's property files.
            let line = |pem: &str| pem.replace('\n', "\\n");
            settings.extend([
                ("listener.name.clients.ssl.keystore.type", "PEM".to_owned()),
                (
                    "listener.name.clients.ssl.keystore.certificate.chain",
                    line(&identity.certificate),
                ),
                ("listener.name.clients.ssl.keystore.key", line(&identity.key)),
            ]);
        }
        settings
    }
}
