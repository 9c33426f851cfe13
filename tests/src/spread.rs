//! Many measurements of one thing.

/// The measurements, sorted; at least one.
#[derive(Clone, Debug)]
pub struct Spread(Vec<f64>);

impl FromIterator<f64> for Spread {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Self(values)
    }
}

impl Spread {
    /// The percentile by nearest rank: the least measurement with at least `percent` percent of all at or below it.
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100);
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    /// The median.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// The least measurement.
    pub fn least(&self) -> f64 {
        self.0[0]
    }

    /// The greatest measurement.
    pub fn most(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// The number of measurements.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}
