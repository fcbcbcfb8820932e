//! What an error of librdkafka means for the message.

use outbox_core::broker::PublishErrorKind;
use rdkafka::error::RDKafkaErrorCode as Code;

/// What an error code says about a message that librdkafka had taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The error is about the message itself or about another one of its batch: which of the
    /// two is known when it has been sent alone.
    Suspect,
    /// The error is about this.
    Known(PublishErrorKind),
    /// We do not know this code. Treated as [`PublishErrorKind::Unknown`], and reported.
    Unlisted,
}

/// The verdict of a delivery report.
///
/// librdkafka repeats a request by itself before it reports, so the last error says nothing about
/// the tries before it: an error that is certain for one try is not certain for the message. So
/// all that it repeats, all timeouts and both kinds of purge are unknown.
pub(crate) fn of_report(code: Code) -> Verdict {
    use PublishErrorKind::{Destination, NotSent, Unavailable, Unknown};
    match code {
        // The broker refuses a batch as a whole, and does so before it appends anything.
        Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidRecord
        | Code::InvalidMessageSize => Verdict::Suspect,

        // Another record of the batch was invalid; the broker named it.
        Code::InvalidDifferentRecord => Verdict::Known(NotSent),

        Code::UnknownTopicOrPartition
        | Code::UnknownTopic
        | Code::InvalidTopic
        | Code::TopicAuthorizationFailed
        | Code::PolicyViolation
        | Code::UnsupportedCompressionType
        | Code::InvalidRequiredAcks
        // Settings of the topic that no message of ours can meet: we always write headers, and
        // the timestamp is the time of the publish, so at fault is a clock and not a message.
        | Code::UnsupportedForMessageFormat
        | Code::InvalidTimestamp => Verdict::Known(Destination),

        Code::AllBrokersDown
        | Code::Resolve
        | Code::BrokerNotAvailable
        | Code::ThrottlingQuotaExceeded
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed
        | Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState
        | Code::SecurityDisabled => Verdict::Known(Unavailable),

        // Either the message names a partition that its topic does not have, or the topic went away
        // with all that was queued for it. The next try is told which.
        Code::UnknownPartition
        // What was sent when a connection had to prove itself anew, and failed.
        | Code::Authentication
        | Code::SSL
        // Reported as delivered, and acknowledged by nobody.
        | Code::NoOffset => Verdict::Known(Unknown),

        Code::MessageTimedOut
        | Code::RequestTimedOut
        | Code::OperationTimedOut
        | Code::TimedOutQueue
        | Code::NetworkException
        | Code::BrokerTransportFailure
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::ReplicaNotAvailable
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::ISRInsufficient
        | Code::KafkaStorageError
        | Code::FencedLeaderEpoch
        | Code::UnknownLeaderEpoch
        | Code::InvalidMessage
        | Code::BadMessage
        | Code::BadCompression
        | Code::InvalidProducerEpoch
        | Code::InvalidProducerIdMapping
        | Code::OutOfOrderSequenceNumber
        | Code::UnknownProducerId
        | Code::PurgeQueue
        | Code::PurgeInflight
        | Code::Fatal
        | Code::GaplessGuarantee
        | Code::Inconsistent
        | Code::Fenced
        | Code::ProducerFenced
        | Code::State
        | Code::Retry
        | Code::BrokerDestroy
        | Code::DestroyBroker
        | Code::Unknown => Verdict::Known(Unknown),

        _ => Verdict::Unlisted,
    }
}

/// The verdict about a message that librdkafka did not take: it is certainly not in the log.
pub(crate) fn of_refusal(code: Code) -> PublishErrorKind {
    match code {
        // A local check of this one message.
        Code::MessageSizeTooLarge => PublishErrorKind::Rejected,
        // Its topic is known, and has no partition of the number that it names.
        Code::UnknownPartition | Code::InvalidArgument => PublishErrorKind::Failed,
        // The whole producer is unusable.
        Code::Fatal | Code::State | Code::Authentication | Code::SSL => {
            PublishErrorKind::Unavailable
        }
        _ => match of_report(code) {
            Verdict::Known(
                kind @ (PublishErrorKind::Destination | PublishErrorKind::Unavailable),
            ) => kind,
            _ => PublishErrorKind::NotSent,
        },
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::types::RDKafkaRespErr;

    use super::*;

    /// Every code of librdkafka whose class is not "unlisted". A code that is new, or that moves
    /// to another class, fails this test; a human then decides.
    const TABLE: &[(i32, &str)] = &[
        (-199, "unknown"),     // BadMessage
        (-198, "unknown"),     // BadCompression
        (-197, "unknown"),     // BrokerDestroy
        (-195, "unknown"),     // BrokerTransportFailure
        (-193, "unavailable"), // Resolve
        (-192, "unknown"),     // MessageTimedOut
        (-190, "unknown"),     // UnknownPartition
        (-188, "destination"), // UnknownTopic
        (-187, "unavailable"), // AllBrokersDown
        (-185, "unknown"),     // OperationTimedOut
        (-183, "unknown"),     // ISRInsufficient
        (-181, "unknown"),     // SSL
        (-172, "unknown"),     // State
        (-169, "unknown"),     // Authentication
        (-168, "unknown"),     // NoOffset
        (-166, "unknown"),     // TimedOutQueue
        (-153, "unknown"),     // Retry
        (-152, "unknown"),     // PurgeQueue
        (-151, "unknown"),     // PurgeInflight
        (-150, "unknown"),     // Fatal
        (-149, "unknown"),     // Inconsistent
        (-148, "unknown"),     // GaplessGuarantee
        (-144, "unknown"),     // Fenced
        (-138, "not_sent"),    // InvalidDifferentRecord
        (-137, "unknown"),     // DestroyBroker
        (-1, "unknown"),       // Unknown
        (2, "unknown"),        // InvalidMessage
        (3, "destination"),    // UnknownTopicOrPartition
        (4, "suspect"),        // InvalidMessageSize
        (5, "unknown"),        // LeaderNotAvailable
        (6, "unknown"),        // NotLeaderForPartition
        (7, "unknown"),        // RequestTimedOut
        (8, "unavailable"),    // BrokerNotAvailable
        (9, "unknown"),        // ReplicaNotAvailable
        (10, "suspect"),       // MessageSizeTooLarge
        (13, "unknown"),       // NetworkException
        (17, "destination"),   // InvalidTopic
        (18, "suspect"),       // MessageBatchTooLarge
        (19, "unknown"),       // NotEnoughReplicas
        (20, "unknown"),       // NotEnoughReplicasAfterAppend
        (21, "destination"),   // InvalidRequiredAcks
        (29, "destination"),   // TopicAuthorizationFailed
        (31, "unavailable"),   // ClusterAuthorizationFailed
        (32, "destination"),   // InvalidTimestamp
        (33, "unavailable"),   // UnsupportedSASLMechanism
        (34, "unavailable"),   // IllegalSASLState
        (43, "destination"),   // UnsupportedForMessageFormat
        (44, "destination"),   // PolicyViolation
        (45, "unknown"),       // OutOfOrderSequenceNumber
        (47, "unknown"),       // InvalidProducerEpoch
        (49, "unknown"),       // InvalidProducerIdMapping
        (53, "unavailable"),   // TransactionalIdAuthorizationFailed
        (54, "unavailable"),   // SecurityDisabled
        (56, "unknown"),       // KafkaStorageError
        (58, "unavailable"),   // SaslAuthenticationFailed
        (59, "unknown"),       // UnknownProducerId
        (74, "unknown"),       // FencedLeaderEpoch
        (75, "unknown"),       // UnknownLeaderEpoch
        (76, "destination"),   // UnsupportedCompressionType
        (87, "suspect"),       // InvalidRecord
        (89, "unavailable"),   // ThrottlingQuotaExceeded
        (90, "unknown"),       // ProducerFenced
    ];

    fn all_codes() -> impl Iterator<Item = (i32, Code)> {
        (-200..=1_000)
            .filter_map(|number| Some((number, Code::from(RDKafkaRespErr::try_from(number).ok()?))))
    }

    #[test]
    fn every_code_of_librdkafka_has_the_class_that_was_decided() {
        let mut listed = 0;
        for (number, code) in all_codes() {
            let class = match of_report(code) {
                Verdict::Suspect => "suspect",
                Verdict::Known(kind) => kind.class(),
                Verdict::Unlisted => "unlisted",
            };
            let decided = TABLE.iter().find(|(other, _)| *other == number);
            assert_eq!(class, decided.map_or("unlisted", |(_, class)| class), "{code:?} {number}");
            listed += usize::from(decided.is_some());
        }
        assert_eq!(listed, TABLE.len(), "the table names codes that librdkafka does not have");
        assert_eq!(all_codes().count(), 173, "librdkafka has other codes: decide about them");
    }

    #[test]
    fn no_report_condemns_a_message() {
        for (_, code) in all_codes() {
            assert_ne!(of_report(code), Verdict::Known(PublishErrorKind::Rejected), "{code:?}");
        }
    }

    #[test]
    fn only_the_local_size_check_condemns_a_message_that_was_not_taken() {
        for (_, code) in all_codes() {
            let condemned = of_refusal(code) == PublishErrorKind::Rejected;
            assert_eq!(condemned, code == Code::MessageSizeTooLarge, "{code:?}");
            assert_ne!(of_refusal(code), PublishErrorKind::Unknown, "{code:?}");
        }
    }
}
