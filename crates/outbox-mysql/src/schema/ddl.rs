//! The tables as text.

use std::num::NonZeroU16;

use crate::tables::Tables;

/// The lane of a row, from its key or, without one, its message id.
///
/// MySQL 9.7 has no MD5(), so CRC32 it is.
pub(super) fn lane_of(lanes: NonZeroU16) -> String {
    format!("CRC32(COALESCE(message_key, message_id)) MOD {lanes}")
}

/// The name of the CHECK that a row's lane is that of its key.
pub(super) fn lane_check(tables: &Tables) -> String {
    format!("{}outbox_lane_is_of_key", tables.prefix)
}

/// The tables but for `meta`, each with columns that only ours has together.
pub(super) fn columns(tables: &Tables) -> [(&str, &'static str); 7] {
    [
        (
            &tables.outbox,
            "id, lane, message_id, topic, message_key, partition_no, headers, payload,\n      \
             created_at, attempts, available_at, held_at, last_error, revision, retried",
        ),
        (&tables.lane, "lane, owner, epoch, expires_at, ttl"),
        (&tables.worker, "worker, healthy, seen_at, ttl"),
        (&tables.held, "outbox_id, message_id, topic, message_key, held_at"),
        (&tables.dead, "id, outbox_id, message_id, died_at"),
        (&tables.delivered, "id, outbox_id, message_id, delivered_at"),
        (&tables.inbox, "consumer, message_id, accepted_at"),
    ]
}

/// Version 1.
///
/// Safe to run again after it stopped half way: MySQL commits every CREATE TABLE by itself. The
/// number of lanes is noted before the outbox table has it, and the version when all is there.
pub(super) fn version_1(tables: &Tables, lanes: NonZeroU16) -> String {
    let crate::tables::Names { prefix, outbox, lane, worker, meta, held, dead, delivered, inbox } =
        &**tables;
    let lane_of_key = lane_of(lanes);
    let lane_check = lane_check(tables);
    let rows: Vec<String> = (0..lanes.get()).map(|lane| format!("({lane})")).collect();
    let rows = rows.join(", ");
    let ours: Vec<String> = columns(tables)
        .iter()
        .map(|(table, columns)| {
            format!("\n  AND NOT EXISTS (\n    SELECT {columns}\n    FROM {table} WHERE FALSE)")
        })
        .collect();
    let ours = ours.concat();
    format!(
        "\
-- The version of these tables, 0 until all of them are there, and the number of lanes. No lanes: a
-- change of their number was interrupted and must be run again.
CREATE TABLE IF NOT EXISTS {meta} (
  one TINYINT NOT NULL DEFAULT 1,
  schema_version INT UNSIGNED NOT NULL,
  lanes SMALLINT UNSIGNED NULL,
  PRIMARY KEY (one)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

INSERT IGNORE INTO {meta} (schema_version, lanes) VALUES (0, {lanes});

-- A duplicate key here: this was begun with another number of lanes, and must be ended with that.
INSERT INTO {meta} (schema_version, lanes)
SELECT 0, {lanes} FROM {meta} WHERE schema_version = 0 AND lanes <> {lanes};

-- Messages that wait. A row is pending while it exists, the relay deletes delivered ones.
-- Write message_id, topic, message_key, partition_no, headers and payload, never lane.
-- Headers are JSON, an object of texts or pairs: see the README of outbox-mysql.
-- Columns are a byte wider than their CHECK: without strict mode the server would cut silently.
CREATE TABLE IF NOT EXISTS {outbox} (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  message_id VARBINARY(17) NOT NULL,
  topic VARCHAR(250) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  message_key VARBINARY(1025) NULL,
  partition_no INT NULL,
  headers MEDIUMBLOB NULL,
  payload LONGBLOB NULL,
  lane SMALLINT UNSIGNED NOT NULL DEFAULT ({lane_of_key}),
  created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  attempts INT UNSIGNED NOT NULL DEFAULT 0,
  available_at DATETIME(6) NULL,
  held_at DATETIME(6) NULL,
  last_error VARBINARY(256) NULL,
  revision INT UNSIGNED NOT NULL DEFAULT 0,
  retried BOOLEAN NOT NULL DEFAULT FALSE,
  PRIMARY KEY (id),
  CONSTRAINT {lane_check} CHECK (lane = {lane_of_key}),
  CONSTRAINT {prefix}outbox_message_id_is_a_uuid CHECK (OCTET_LENGTH(message_id) = 16),
  CONSTRAINT {prefix}outbox_partition_fits CHECK (partition_no >= 0),
  CONSTRAINT {prefix}outbox_topic_fits CHECK (OCTET_LENGTH(topic) BETWEEN 1 AND 249),
  CONSTRAINT {prefix}outbox_key_fits CHECK (OCTET_LENGTH(message_key) <= 1024),
  CONSTRAINT {prefix}outbox_headers_fit CHECK (OCTET_LENGTH(headers) <= 65536),
  CONSTRAINT {prefix}outbox_payload_fits CHECK (OCTET_LENGTH(payload) <= 15728640)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Who may publish which lane. Epochs only grow: rows are never deleted.
CREATE TABLE IF NOT EXISTS {lane} (
  lane SMALLINT UNSIGNED NOT NULL,
  owner BINARY(16) NULL,
  epoch BIGINT UNSIGNED NOT NULL DEFAULT 0,
  expires_at DATETIME(6) NOT NULL DEFAULT '1970-01-01 00:00:00',
  ttl BIGINT UNSIGNED NOT NULL DEFAULT 0 COMMENT 'microseconds',
  PRIMARY KEY (lane)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

INSERT IGNORE INTO {lane} (lane) VALUES {rows};

-- Running dispatchers.
CREATE TABLE IF NOT EXISTS {worker} (
  worker BINARY(16) NOT NULL,
  healthy BOOLEAN NOT NULL,
  seen_at DATETIME(6) NOT NULL,
  ttl BIGINT UNSIGNED NOT NULL COMMENT 'microseconds',
  PRIMARY KEY (worker)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Messages of the outbox that wait for an operator, so that nobody scans the outbox for them.
CREATE TABLE IF NOT EXISTS {held} (
  outbox_id BIGINT UNSIGNED NOT NULL,
  message_id BINARY(16) NOT NULL,
  topic VARCHAR(250) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  message_key VARBINARY(1025) NULL,
  held_at DATETIME(6) NOT NULL,
  PRIMARY KEY (outbox_id),
  KEY {prefix}outbox_held_message (message_id),
  KEY {prefix}outbox_held_key (topic, message_key)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Messages that left the outbox undelivered, in full.
CREATE TABLE IF NOT EXISTS {dead} (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  outbox_id BIGINT UNSIGNED NOT NULL,
  message_id BINARY(16) NOT NULL,
  topic VARCHAR(250) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  message_key VARBINARY(1025) NULL,
  partition_no INT NULL,
  headers MEDIUMBLOB NULL,
  payload LONGBLOB NULL,
  created_at DATETIME(6) NOT NULL,
  attempts INT UNSIGNED NOT NULL,
  last_error VARBINARY(256) NULL,
  revision INT UNSIGNED NOT NULL,
  retried BOOLEAN NOT NULL,
  died_at DATETIME(6) NOT NULL,
  PRIMARY KEY (id),
  KEY {prefix}outbox_dead_message (message_id),
  KEY {prefix}outbox_dead_topic (topic)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Copies of delivered messages, where the archive is switched on.
CREATE TABLE IF NOT EXISTS {delivered} (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  outbox_id BIGINT UNSIGNED NOT NULL,
  message_id BINARY(16) NOT NULL,
  topic VARCHAR(250) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  message_key VARBINARY(1025) NULL,
  headers MEDIUMBLOB NULL,
  payload LONGBLOB NULL,
  created_at DATETIME(6) NOT NULL,
  attempts INT UNSIGNED NOT NULL,
  partition_no INT NULL COMMENT 'where it went',
  offset_no BIGINT NULL COMMENT 'where it went',
  delivered_at DATETIME(6) NOT NULL,
  PRIMARY KEY (id),
  UNIQUE KEY {prefix}outbox_delivered_message (message_id, outbox_id)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Messages of other services that consumers of this database have accepted.
CREATE TABLE IF NOT EXISTS {inbox} (
  consumer VARBINARY(255) NOT NULL,
  message_id BINARY(16) NOT NULL,
  accepted_at DATETIME(6) NOT NULL,
  PRIMARY KEY (consumer, message_id),
  KEY {prefix}outbox_inbox_accepted (accepted_at)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- All of them are there. An unknown column here: one of them is a table of somebody else. Give that
-- another name, or ours a prefix, and run this again.
UPDATE {meta} SET schema_version = 1
WHERE one = 1 AND schema_version = 0 AND lanes = {lanes}{ours};
"
    )
}
