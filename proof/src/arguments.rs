//! `--name value` pairs, and nothing else.

use std::collections::BTreeMap;
use std::str::FromStr;

/// The arguments of a command.
#[derive(Debug)]
pub struct Arguments(BTreeMap<String, String>);

impl Arguments {
    /// Those of this process.
    ///
    /// # Errors
    ///
    /// A sentence for the user, if they are not pairs of names in `known` and values.
    pub fn of_process(known: &[&str]) -> Result<Self, String> {
        let mut words = std::env::args().skip(1);
        let mut pairs = BTreeMap::new();
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").filter(|name| known.contains(name));
            let name = name.ok_or_else(|| format!("{word:?} is none of {known:?}"))?;
            let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
            pairs.insert(name.to_owned(), value);
        }
        Ok(Self(pairs))
    }

    /// The value of `name`, or `default` where it is absent.
    ///
    /// # Errors
    ///
    /// A sentence for the user, if the value cannot be read.
    pub fn or<T: FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        match self.0.get(name) {
            None => Ok(default),
            Some(value) => value.parse().map_err(|_| format!("--{name} {value}: not understood")),
        }
    }
}

/// A number in groups of three digits.
pub fn count(number: impl TryInto<u64>) -> String {
    let digits = number.try_into().unwrap_or(u64::MAX).to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or_default())
        .collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn numbers_are_grouped_by_three_digits() {
        assert_eq!(count(0_u64), "0");
        assert_eq!(count(999_u64), "999");
        assert_eq!(count(1_234_567_u64), "1,234,567");
    }
}
