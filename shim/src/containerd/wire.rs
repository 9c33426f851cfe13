//! Decodes protocol-buffer messages that containerd-shim-protos does not have, field by field into types of our own.
//!
//! One function per message matches on the field number:
//!
//! ```text
//!  fn dns(dns: &mut Dns, field: Field) -> Result<()> {
//!      match field.number {
//!          1 => dns.servers.push(field.string()?),
//!          _ => field.skip()?,                       a field that the shim does not read
//!      }
//!      Ok(())
//!  }
//! ```
//!
//! As the protobuf documentation ("Encoding") asks: the last value of a field wins, and a message in several parts is
//! merged, for the parts are read into the same value.

use std::collections::BTreeMap;
use std::io;

use containerd_shim_protos::protobuf::rt::WireType;
use containerd_shim_protos::protobuf::{CodedInputStream, Result};

/// One field of a message, whose value is still to be read. Each method that reads the value fails for a field of
/// another wire type.
#[derive(Debug)]
pub(super) struct Field<'a, 'bytes> {
    /// The field's number in its message.
    pub(super) number: u32,
    kind: WireType,
    input: &'a mut CodedInputStream<'bytes>,
}

/// Reads one field into a message.
pub(super) type Read<T> = fn(&mut T, Field<'_, '_>) -> Result<()>;

/// Decodes the message in `bytes`.
///
/// # Errors
/// The protobuf crate's, for bytes that are no such message.
pub(super) fn decode<T: Default>(bytes: &[u8], read: Read<T>) -> Result<T> {
    let mut message = T::default();
    let mut input = CodedInputStream::from_bytes(bytes);
    // Without this limit the library accepts a nested message that is longer than the bytes.
    input.push_limit(u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
    fields(&mut input, &mut message, read)?;
    Ok(message)
}

fn fields<T>(input: &mut CodedInputStream<'_>, message: &mut T, read: Read<T>) -> Result<()> {
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // A tag is the field's number and three bits for the wire type.
        let (number, kind) = (tag >> 3, WireType::new(tag & 7));
        let Some(kind) = kind.filter(|_| number != 0) else {
            return Err(io::Error::other(format!("tag {tag} is none of a field")).into());
        };
        read(
            message,
            Field {
                number,
                kind,
                input,
            },
        )?;
    }
    Ok(())
}

impl Field<'_, '_> {
    fn expect(&self, kind: WireType) -> Result<()> {
        if self.kind == kind {
            return Ok(());
        }
        let Self {
            number, kind: got, ..
        } = self;
        Err(io::Error::other(format!("field {number} is {got:?}, expected {kind:?}")).into())
    }

    /// Reads a `string`.
    pub(super) fn string(self) -> Result<String> {
        self.expect(WireType::LengthDelimited)?;
        self.input.read_string()
    }

    /// Reads `bytes`.
    pub(super) fn bytes(self) -> Result<Vec<u8>> {
        self.expect(WireType::LengthDelimited)?;
        self.input.read_bytes()
    }

    /// Reads a `bool`.
    pub(super) fn bool(self) -> Result<bool> {
        self.expect(WireType::Varint)?;
        self.input.read_bool()
    }

    /// Reads an `int32` or an enum.
    pub(super) fn int32(self) -> Result<i32> {
        self.expect(WireType::Varint)?;
        self.input.read_int32()
    }

    /// Reads a `uint32`.
    pub(super) fn uint32(self) -> Result<u32> {
        self.expect(WireType::Varint)?;
        self.input.read_uint32()
    }

    /// Reads an `int64`.
    pub(super) fn int64(self) -> Result<i64> {
        self.expect(WireType::Varint)?;
        self.input.read_int64()
    }

    /// Reads a message into `message`.
    pub(super) fn message<T>(self, message: &mut T, read: Read<T>) -> Result<()> {
        self.expect(WireType::LengthDelimited)?;
        let length = self.input.read_raw_varint64()?;
        let outer = self.input.push_limit(length)?;
        fields(self.input, message, read)?;
        self.input.pop_limit(outer);
        Ok(())
    }

    /// Reads one message of a `repeated` field.
    pub(super) fn element<T: Default>(self, into: &mut Vec<T>, read: Read<T>) -> Result<()> {
        let mut element = T::default();
        self.message(&mut element, read)?;
        into.push(element);
        Ok(())
    }

    /// Reads one entry of a `map<string, string>`: on the wire a message with the key and the value.
    pub(super) fn entry(self, into: &mut BTreeMap<String, String>) -> Result<()> {
        let mut entry = (String::new(), String::new());
        self.message(&mut entry, |(key, value), field| {
            match field.number {
                1 => *key = field.string()?,
                2 => *value = field.string()?,
                _ => field.skip()?,
            }
            Ok(())
        })?;
        into.insert(entry.0, entry.1);
        Ok(())
    }

    /// Passes over the value.
    pub(super) fn skip(self) -> Result<()> {
        self.input.skip_field(self.kind)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Sample {
        text: String,
        number: i32,
        inner: Vec<(u32, bool)>,
        map: BTreeMap<String, String>,
    }

    fn sample(sample: &mut Sample, field: Field<'_, '_>) -> Result<()> {
        match field.number {
            1 => sample.text = field.string()?,
            2 => sample.number = field.int32()?,
            3 => field.element(&mut sample.inner, |inner, field| {
                match field.number {
                    1 => inner.0 = field.uint32()?,
                    2 => inner.1 = field.bool()?,
                    _ => field.skip()?,
                }
                Ok(())
            })?,
            4 => field.entry(&mut sample.map)?,
            _ => field.skip()?,
        }
        Ok(())
    }

    #[test]
    fn fields_are_read_wherever_they_stand_and_others_are_passed_over() {
        let bytes = b"\x2a\x01x\x22\x06\x0a\x01k\x12\x01v\x0a\x01a\x10\x07\x1a\x04\x08\x09\x10\x01\x1a\x00\x0a\x01b\
            \x31\0\0\0\0\0\0\0\0\x3d\0\0\0\0\x43\x08\x01\x44";
        let expected = Sample {
            text: "b".into(),
            number: 7,
            inner: vec![(9, true), (0, false)],
            map: BTreeMap::from([("k".into(), "v".into())]),
        };
        assert_eq!(decode(bytes, sample).unwrap(), expected);
        assert_eq!(decode(b"", sample).unwrap(), Sample::default());
        let negative = b"\x10\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        assert_eq!(decode(negative, sample).unwrap().number, -2);
    }

    #[test]
    fn what_is_no_such_message_is_refused() {
        for bytes in [
            b"\x0a\x02a".as_slice(),
            b"\x0a\x01\xff",
            b"\x08\x01",
            b"\x12\x00",
            b"\x00\x00",
            b"\x0f",
            b"\x1a\x05\x08\x01",
            b"\x1a\x01\x08\x01",
            b"\x0a\xff\xff\xff\xff\x0f",
            b"\x44",
        ] {
            assert!(decode(bytes, sample).is_err(), "{bytes:?}");
        }
    }
}
