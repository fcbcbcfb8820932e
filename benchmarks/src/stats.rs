//! What many measurements say: median, spread, percentiles.

/// Repetitions of one measurement.
#[derive(Debug, Clone, Default)]
pub(crate) struct Runs(Vec<f64>);

impl Runs {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn median(&self) -> f64 {
        percentile(&self.0, 0.5)
    }

    /// NaN if nothing was measured.
    pub(crate) fn last(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }

    /// Every repetition of ours by the one of theirs that was measured beside it.
    pub(crate) fn ratio(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(ours, theirs)| ours / theirs).collect())
    }

    fn spread(&self) -> (f64, f64) {
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (least, most)
    }

    /// `median [least-most]`, each written by `one`; the median alone if there is one run.
    pub(crate) fn show(&self, one: impl Fn(f64) -> String) -> String {
        let (least, most) = self.spread();
        match self.0.len() {
            0 => "not measured".to_owned(),
            1 => one(least),
            _ => format!("{} [{}-{}]", one(self.median()), one(least), one(most)),
        }
    }

    /// As a rate in thousands a second.
    pub(crate) fn rate(&self) -> String {
        self.show(rate)
    }
}

impl FromIterator<f64> for Runs {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// A rate per second, as short as its size allows.
pub(crate) fn rate(value: f64) -> String {
    match value {
        v if v >= 10_000.0 => format!("{:.1}k", v / 1_000.0),
        v if v >= 1_000.0 => format!("{:.2}k", v / 1_000.0),
        v => format!("{v:.0}"),
    }
}

/// A share, such as 0.93.
pub(crate) fn share(value: f64) -> String {
    format!("{value:.2}")
}

/// Milliseconds with two digits behind the point where they matter.
pub(crate) fn millis(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// The value below which that share of all values lies; nearest rank. NaN without values.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if share == 0.5 && sorted.len().is_multiple_of(2) && !sorted.is_empty() {
        let above = sorted.len() / 2;
        return (sorted[above - 1] + sorted[above]) / 2.0;
    }
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=1_000).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.99), 990.0);
        assert_eq!(percentile(&values, 0.999), 999.0);
        assert_eq!(percentile(&[7.0], 0.999), 7.0);
        assert!(percentile(&[], 0.5).is_nan());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(percentile(&[4.0, 1.0, 3.0, 2.0], 0.5), 2.5);
    }

    #[test]
    fn a_ratio_is_of_runs_that_were_paired() {
        let ours: Runs = [90.0, 50.0, 100.0].into_iter().collect();
        let theirs: Runs = [100.0, 100.0, 100.0].into_iter().collect();
        assert_eq!(ours.ratio(&theirs).show(share), "0.90 [0.50-1.00]");
    }
}
