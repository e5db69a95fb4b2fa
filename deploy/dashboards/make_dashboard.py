#!/usr/bin/env python3
"""Makes prefilld.json, the Grafana dashboard, of the panels in panels.py.

    deploy/dashboards/make_dashboard.py

It needs grafana-foundation-sdk, which Grafana Labs generate from Grafana's own schemas.
"""

import json
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models import dashboard as dashboard_models
from panels import ROWS, Panel

DASHBOARD = Path(__file__).resolve().parent / "prefilld.json"
SOURCE = dashboard_models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def build_panel(panel: Panel):
    if panel.kind == "number":
        built = stat.Panel().height(4)
        built.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        built = timeseries.Panel().height(8).min(0).line_width(1.5).show_points(models.VisibilityMode.NEVER)
        legend = common.VizLegendOptions().show_legend(True).placement(models.LegendPlacement.BOTTOM)
        built.legend(legend.display_mode(models.LegendDisplayMode.LIST))
        built.tooltip(common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI))
        if panel.kind == "stacked":
            built.fill_opacity(30).stacking(common.StackingConfig().mode(models.StackingMode.NORMAL))
        if panel.top is not None:
            built.max(panel.top)
    built.title(panel.title).description(panel.description).unit(panel.unit).span(panel.width).datasource(SOURCE)
    for i, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + i)).range()
        built.with_target(target.datasource(SOURCE))
    return built


def build_dashboard() -> str:
    """Returns the dashboard as JSON."""
    built = (
        dashboard.Dashboard("prefilld")
        .uid("prefilld")
        .tags(["prefilld"])
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(dashboard_models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Servers")
            .datasource(SOURCE)
            .query("label_values(prefilld_ready, instance)")
            .refresh(dashboard_models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for row in ROWS:
        built.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            built.with_panel(build_panel(panel))
    model = built.build()
    for number, panel in enumerate(model.panels, start=1):
        panel.id_val = number
    return json.dumps(model, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(build_dashboard())
