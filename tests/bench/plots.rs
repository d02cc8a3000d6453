//! Plots as SVG.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::latency::Timeline;
use crate::{Context, Result};

const FONT: &str = "sans-serif";
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const RED: RGBColor = RGBColor(0xd6, 0x27, 0x28);

/// Rate, latency and failures over time, a column for each peer, all with the same scales.
pub fn timelines(file: &Path, columns: &[(&str, &Timeline)]) -> Result<()> {
    let root = SVGBackend::new(file, (480 * columns.len() as u32, 620)).into_drawing_area();
    let draw = || -> std::result::Result<(), Box<dyn std::error::Error>> {
        root.fill(&WHITE)?;
        let cells = root.split_evenly((3, columns.len()));
        let most =
            |figure: fn(&Timeline) -> f64| columns.iter().map(|(_, line)| figure(line)).fold(0.0, f64::max);
        let end = most(|line| line.buckets.last().map_or(0.0, |bucket| bucket.second));
        let rate = most(|line| line.buckets.iter().map(|bucket| bucket.rate).fold(0.0, f64::max)) * 1.1;
        let latency =
            most(|line| line.buckets.iter().map(|bucket| bucket.longest_ms).fold(0.0, f64::max)) * 1.5;
        let failed = most(|line| line.buckets.iter().map(|bucket| bucket.failed as f64).fold(0.0, f64::max));
        for (column, (name, line)) in columns.iter().enumerate() {
            let cell = |row: usize| &cells[row * columns.len() + column];
            let start = -line.before_reload;
            let series = |figure: fn(&crate::latency::Bucket) -> f64| {
                line.buckets.iter().map(move |bucket| (bucket.second, figure(bucket)))
            };

            let mut chart = chart(cell(0), &format!("{name}: answers per second"))
                .build_cartesian_2d(start..end, 0.0..rate)?;
            chart.configure_mesh().x_labels(6).y_labels(5).light_line_style(WHITE).draw()?;
            chart.draw_series([shade(line, 0.0, rate)])?;
            chart.draw_series(LineSeries::new(series(|bucket| bucket.rate), OURS.stroke_width(2)))?;

            let mut chart = self::chart(cell(1), "latency in ms: p50, longest")
                .build_cartesian_2d(start..end, (0.1..latency.max(1.0)).log_scale())?;
            chart.configure_mesh().x_labels(6).y_labels(5).light_line_style(WHITE).draw()?;
            chart.draw_series([shade(line, 0.1, latency.max(1.0))])?;
            let answered =
                |figure: fn(&crate::latency::Bucket) -> f64| series(figure).filter(|(_, ms)| *ms > 0.0);
            chart.draw_series(LineSeries::new(answered(|bucket| bucket.p50_ms), OURS.stroke_width(2)))?;
            let points =
                answered(|bucket| bucket.longest_ms).map(|point| Circle::new(point, 2, BLACK.filled()));
            chart.draw_series(points)?;

            let title = format!("failed requests: {}", line.buckets.iter().map(|b| b.failed).sum::<u64>());
            let mut chart =
                self::chart(cell(2), &title).build_cartesian_2d(start..end, 0.0..failed.max(1.0) * 1.1)?;
            chart
                .configure_mesh()
                .x_labels(6)
                .y_labels(5)
                .light_line_style(WHITE)
                .x_desc("seconds since the start of the reload")
                .draw()?;
            chart.draw_series([shade(line, 0.0, failed.max(1.0) * 1.1)])?;
            let bars = series(|bucket| bucket.failed as f64).filter(|(_, failed)| *failed > 0.0);
            let bar = |(second, failed)| {
                Rectangle::new([(second, 0.0), (second + Timeline::BUCKET, failed)], RED.filled())
            };
            chart.draw_series(bars.map(bar))?;
        }
        root.present()?;
        Ok(())
    };
    draw().context(&file.display().to_string())
}

/// Shades the time of the reload.
fn shade(line: &Timeline, low: f64, high: f64) -> Rectangle<(f64, f64)> {
    Rectangle::new([(0.0, low), (line.reload_seconds, high)], BLACK.mix(0.08).filled())
}

/// Lines through points, with logarithmic scales.
pub fn lines(file: &Path, title: &str, x: &str, lines: &[(&str, Vec<(f64, f64)>)]) -> Result<()> {
    let root = SVGBackend::new(file, (640, 420)).into_drawing_area();
    let draw = || -> std::result::Result<(), Box<dyn std::error::Error>> {
        root.fill(&WHITE)?;
        let points = || lines.iter().flat_map(|(_, points)| points);
        let span = |axis: fn(&(f64, f64)) -> f64| {
            let low = points().map(axis).fold(f64::INFINITY, f64::min);
            (low * 0.8..points().map(axis).fold(0.0, f64::max) * 1.3).log_scale()
        };
        let mut chart = chart(&root, title).build_cartesian_2d(span(|p| p.0), span(|p| p.1))?;
        chart.configure_mesh().x_desc(x).light_line_style(WHITE).draw()?;
        for (index, (name, points)) in lines.iter().enumerate() {
            let colour = Palette99::pick(index).to_rgba();
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .label_font((FONT, 13))
            .draw()?;
        root.present()?;
        Ok(())
    };
    draw().context(&file.display().to_string())
}

fn chart<'a, 'b>(
    area: &'a DrawingArea<SVGBackend<'b>, Shift>,
    title: &str,
) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut chart = ChartBuilder::on(area);
    chart.caption(title, (FONT, 15)).margin(8).x_label_area_size(34).y_label_area_size(48);
    chart
}
