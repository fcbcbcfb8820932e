//! Lossless bytes of a message, for stores without columns.

use super::{Headers, Message, MessageError, MessageErrorKind, MessageId};

const VERSION: u8 = 1;

impl Message {
    /// Encodes the message without loss. The first byte is the version of the format.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.size() + self.topic().len());
        out.push(VERSION);
        out.extend_from_slice(self.id().as_bytes());
        put(&mut out, Some(self.topic().as_bytes()));
        put(&mut out, self.key());
        put(&mut out, self.payload());
        out.extend_from_slice(&self.partition().unwrap_or(-1).to_le_bytes());
        out.extend_from_slice(&(self.headers().len() as u32).to_le_bytes());
        for (name, value) in self.headers().iter() {
            put(&mut out, Some(name.as_bytes()));
            put(&mut out, value);
        }
        out
    }

    /// Decodes what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    ///
    /// [`MessageErrorKind::Malformed`] for anything else, a newer format version included.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut input = bytes;
        decode(&mut input).ok_or_else(|| MessageErrorKind::Malformed.into())
    }
}

/// Length plus one as a little-endian u32, zero for null, then the bytes.
fn put(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    let length = bytes.map_or(0, |bytes| bytes.len() as u32 + 1);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes.unwrap_or_default());
}

fn take<'a>(input: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = input.split_at_checked(count)?;
    *input = tail;
    Some(head)
}

fn take_u32(input: &mut &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(take(input, 4)?.try_into().ok()?))
}

fn get<'a>(input: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    match take_u32(input)? {
        0 => Some(None),
        length => take(input, length as usize - 1).map(Some),
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

fn decode(input: &mut &[u8]) -> Option<Message> {
    if take(input, 1)? != [VERSION] {
        return None;
    }
    let id = MessageId::from_bytes(take(input, 16)?.try_into().ok()?);
    let topic = text(get(input)??)?;
    super::check_topic(&topic).ok()?;
    let key = get(input)?.map(<[u8]>::to_vec);
    let payload = get(input)?.map(<[u8]>::to_vec);
    let partition = take_u32(input)?.cast_signed();
    let mut headers = Headers::default();
    for _ in 0..take_u32(input)? {
        let name = text(get(input)??)?;
        headers.append(name, get(input)?.map(<[u8]>::to_vec)).ok()?;
    }
    if !input.is_empty() {
        return None;
    }
    let partition = (partition >= 0).then_some(partition);
    Some(Message { id, topic: topic.into(), key, payload, headers, partition })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        let all = Message::builder("t.a")
            .key([0, 255])
            .payload([1, 2])
            .header("h", "v")
            .null_header("n")
            .partition(7);
        vec![
            all.build().unwrap(),
            Message::builder("t").tombstone().build().unwrap(),
            Message::builder("t").key("").payload("").build().unwrap(),
        ]
    }

    #[test]
    fn decode_returns_what_encode_was_given() {
        for message in samples() {
            assert_eq!(Message::decode(&message.encode()).unwrap(), message);
        }
    }

    #[test]
    fn every_truncation_and_every_other_version_is_malformed() {
        for message in samples() {
            let bytes = message.encode();
            for cut in 0..bytes.len() {
                assert!(Message::decode(&bytes[..cut]).is_err());
            }
            let mut newer = bytes.clone();
            newer[0] = 2;
            assert!(Message::decode(&newer).is_err());
        }
    }
}
