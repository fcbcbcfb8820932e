-- The version of these tables, 0 until all of them are there, and the number of lanes. No lanes: a
-- change of their number was interrupted and must be run again.
CREATE TABLE IF NOT EXISTS outbox_meta (
  one TINYINT NOT NULL DEFAULT 1,
  schema_version INT UNSIGNED NOT NULL,
  lanes SMALLINT UNSIGNED NULL,
  PRIMARY KEY (one)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

INSERT IGNORE INTO outbox_meta (schema_version, lanes) VALUES (0, 16);

-- A duplicate key here: this was begun with another number of lanes, and must be ended with that.
INSERT INTO outbox_meta (schema_version, lanes)
SELECT 0, 16 FROM outbox_meta WHERE schema_version = 0 AND lanes <> 16;

-- Messages that wait. A row is pending while it exists, the relay deletes delivered ones.
-- Write message_id, topic, message_key, partition_no, headers and payload, never lane.
-- Headers are JSON, an object of texts or pairs: see the README of outbox-mysql.
-- Columns are a byte wider than their CHECK: without strict mode the server would cut silently.
CREATE TABLE IF NOT EXISTS outbox (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  message_id VARBINARY(17) NOT NULL,
  topic VARCHAR(250) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  message_key VARBINARY(1025) NULL,
  partition_no INT NULL,
  headers MEDIUMBLOB NULL,
  payload LONGBLOB NULL,
  lane SMALLINT UNSIGNED NOT NULL DEFAULT (CRC32(COALESCE(message_key, message_id)) MOD 16),
  created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
  attempts INT UNSIGNED NOT NULL DEFAULT 0,
  available_at DATETIME(6) NULL,
  held_at DATETIME(6) NULL,
  last_error VARBINARY(256) NULL,
  revision INT UNSIGNED NOT NULL DEFAULT 0,
  retried BOOLEAN NOT NULL DEFAULT FALSE,
  PRIMARY KEY (id),
  CONSTRAINT outbox_lane_is_of_key CHECK (lane = CRC32(COALESCE(message_key, message_id)) MOD 16),
  CONSTRAINT outbox_message_id_is_a_uuid CHECK (OCTET_LENGTH(message_id) = 16),
  CONSTRAINT outbox_partition_fits CHECK (partition_no >= 0),
  CONSTRAINT outbox_topic_fits CHECK (OCTET_LENGTH(topic) BETWEEN 1 AND 249),
  CONSTRAINT outbox_key_fits CHECK (OCTET_LENGTH(message_key) <= 1024),
  CONSTRAINT outbox_headers_fit CHECK (OCTET_LENGTH(headers) <= 65536),
  CONSTRAINT outbox_payload_fits CHECK (OCTET_LENGTH(payload) <= 15728640)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Who may publish which lane. Epochs only grow: rows are never deleted.
CREATE TABLE IF NOT EXISTS outbox_lane (
  lane SMALLINT UNSIGNED NOT NULL,
  owner BINARY(16) NULL,
  epoch BIGINT UNSIGNED NOT NULL DEFAULT 0,
  expires_at DATETIME(6) NOT NULL DEFAULT '1970-01-01 00:00:00',
  ttl BIGINT UNSIGNED NOT NULL DEFAULT 0 COMMENT 'microseconds',
  PRIMARY KEY (lane)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

INSERT IGNORE INTO outbox_lane (lane) VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9), (10), (11), (12), (13), (14), (15);

-- Running dispatchers.
CREATE TABLE IF NOT EXISTS outbox_worker (
  worker BINARY(16) NOT NULL,
  healthy BOOLEAN NOT NULL,
  seen_at DATETIME(6) NOT NULL,
  ttl BIGINT UNSIGNED NOT NULL COMMENT 'microseconds',
  PRIMARY KEY (worker)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Messages of the outbox that wait for an operator, so that nobody scans the outbox for them.
CREATE TABLE IF NOT EXISTS outbox_held (
  outbox_id BIGINT UNSIGNED NOT NULL,
  message_id BINARY(16) NOT NULL,
  topic VARCHAR(250) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  message_key VARBINARY(1025) NULL,
  held_at DATETIME(6) NOT NULL,
  PRIMARY KEY (outbox_id),
  KEY outbox_held_message (message_id),
  KEY outbox_held_key (topic, message_key)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Messages that left the outbox undelivered, in full.
CREATE TABLE IF NOT EXISTS outbox_dead (
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
  KEY outbox_dead_message (message_id),
  KEY outbox_dead_topic (topic)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Copies of delivered messages, where the archive is switched on.
CREATE TABLE IF NOT EXISTS outbox_delivered (
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
  UNIQUE KEY outbox_delivered_message (message_id, outbox_id)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- Messages of other services that consumers of this database have accepted.
CREATE TABLE IF NOT EXISTS outbox_inbox (
  consumer VARBINARY(255) NOT NULL,
  message_id BINARY(16) NOT NULL,
  accepted_at DATETIME(6) NOT NULL,
  PRIMARY KEY (consumer, message_id),
  KEY outbox_inbox_accepted (accepted_at)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

-- All of them are there. An unknown column here: one of them is a table of somebody else. Give that
-- another name, or ours a prefix, and run this again.
UPDATE outbox_meta SET schema_version = 1
WHERE one = 1 AND schema_version = 0 AND lanes = 16
  AND NOT EXISTS (
    SELECT id, lane, message_id, topic, message_key, partition_no, headers, payload,
      created_at, attempts, available_at, held_at, last_error, revision, retried
    FROM outbox WHERE FALSE)
  AND NOT EXISTS (
    SELECT lane, owner, epoch, expires_at, ttl
    FROM outbox_lane WHERE FALSE)
  AND NOT EXISTS (
    SELECT worker, healthy, seen_at, ttl
    FROM outbox_worker WHERE FALSE)
  AND NOT EXISTS (
    SELECT outbox_id, message_id, topic, message_key, held_at
    FROM outbox_held WHERE FALSE)
  AND NOT EXISTS (
    SELECT id, outbox_id, message_id, died_at
    FROM outbox_dead WHERE FALSE)
  AND NOT EXISTS (
    SELECT id, outbox_id, message_id, delivered_at
    FROM outbox_delivered WHERE FALSE)
  AND NOT EXISTS (
    SELECT consumer, message_id, accepted_at
    FROM outbox_inbox WHERE FALSE);
