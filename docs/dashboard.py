"""The Grafana dashboard, from what it asks: `page()` is the file in packaging/grafana/.

A query writes `NODE` for the labels of the chosen nodes, and `GPU` for those of the chosen GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from doctor.rule import Severity
from rules import RULES

RUNBOOKS = "https://git.example/gpu-doctor/blob/main/rules"
"""Where the runbooks lie, until somebody says where at the top of the dashboard."""

NODE = 'job=~"$job",instance=~"$instance"'
GPU = f'{NODE},gpu=~"$gpu"'
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

OF_NODE, OF_GPU, OF_ENGINE = "{{instance}}", "{{instance}} GPU {{gpu}}", "{{instance}} {{engine}}"

Mapping = tuple[tuple[float | str, str, str], ...]
"""Values with the words and the colours that are shown for them."""

SEVERITIES: Mapping = tuple(
    (severity.value, severity.word, colour)
    for severity, colour in zip(Severity, ("blue", "orange", "red"), strict=True)
)
VERDICTS: Mapping = (
    (0, "CLEAR", "green"), (1, "NOTICE", "blue"), (2, "INCOMPLETE", "yellow"), (3, "WARNING", "orange"), (4, "CRITICAL", "red"),
)  # fmt: skip
"""As `instance:gpu_doctor_verdict:rank` counts them."""
TITLES: Mapping = tuple((rule.id, rule.title, "text") for rule in RULES)
YES_NO: Mapping = ((0, "no", "red"), (1, "yes", "green"))


class Query(NamedTuple):
    """What is asked, and what its series are called."""

    expression: str
    legend: str = OF_NODE


class Panel(NamedTuple):
    """One question and its answer."""

    kind: str
    """`lines` over time, a `number`, a `table`, or `states` over time."""
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    height: int = 8
    least: float | None = 0
    most: float | None = None
    mapping: Mapping = ()
    steps: tuple[tuple[float, str], ...] = ()
    """From which value on which colour; below the first it is green."""
    columns: tuple[tuple[str, str], ...] = ()
    """Of a table: label or value, and what stands above the column."""
    nothing: str | None = None
    """What stands there where there is no answer."""


class Row(NamedTuple):
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


def lines(title: str, description: str, unit: str, *queries: tuple[str, str], **more: Any) -> Panel:
    """Return a panel of lines over time."""
    return Panel("lines", title, description, unit, tuple(Query(*query) for query in queries), **more)


def number(title: str, description: str, unit: str, query: str, **more: Any) -> Panel:
    """Return a panel of one number a node."""
    return Panel("number", title, description, unit, (Query(query),), width=6, height=4, **more)


def grid(title: str, description: str, *queries: str, **more: Any) -> Panel:
    """Return a table of labels and values now."""
    return Panel("table", title, description, units.Short, tuple(Query(query) for query in queries), **more)


def states(title: str, description: str, query: str, legend: str, mapping: Mapping, **more: Any) -> Panel:
    """Return a panel of coloured bars over time."""
    return Panel("states", title, description, units.Short, (Query(query, legend),), mapping=mapping, **more)


# What is asked -----------------------------------------------------------------------------------------------------


def _rank() -> str:
    """Return the query of a node's verdict as a number, without the recorded rules."""
    return " + ".join(
        f'{value} * sum by (instance) (gpu_doctor_verdict{{NODE,verdict="{word.lower()}"}})'
        for value, word, _ in VERDICTS
        if value
    )


def _weighed(matchers: str) -> str:
    """Return the query of findings, with their severity as value."""
    return " or ".join(
        f'{value} * gpu_doctor_finding{{NODE,{matchers},severity="{word}"}}' for value, word, _ in reversed(SEVERITIES)
    )


def _told(query: str) -> str:
    """Return the query with labels for the failure mode's title and for its runbook's file."""
    query = f'label_replace({query}, "what", "$1", "failure_mode", "(.*)")'
    query = f'label_replace({query}, "runbook", "$1", "failure_mode", "(.*)")'
    for _ in range(max(rule.id.count("-") for rule in RULES)):  # each takes one hyphen
        query = f'label_replace({query}, "runbook", "${{1}}_${{2}}", "runbook", "(.*)-(.*)")'
    return query


def findings(title: str, description: str, matchers: str, **more: Any) -> Panel:
    """Return a table of findings, worst first."""
    by = "by (instance, failure_mode, confidence)"
    return grid(
        title, description,
        _told(f"max {by} ({_weighed(matchers)})"),
        _told(f'count {by} (gpu_doctor_finding{{NODE,{matchers},uuid!=""}})'),
        columns=(("Value #A", "severity"), ("instance", "node"), ("what", "what is wrong"), ("failure_mode", "failure mode"),
                 ("Value #B", "GPUs"), ("confidence", "confidence"), ("runbook", "runbook")),
        **more,
    )  # fmt: skip


ROWS = (
    Row("Now: what is wrong, why, and what is not known", (
        number("Verdict", "The answer of each node in one word. INCOMPLETE: nothing fires, and something essential can't be seen.",
               units.Short, _rank(), mapping=VERDICTS, nothing="NO REPORT"),
        number("Age of the report", "How long ago the visit began on which the verdict stands. After three intervals the report is withdrawn.",
               units.Seconds, "time() - max by (instance) (gpu_doctor_report_timestamp_seconds{NODE})",
               steps=((60, "orange"), (300, "red")), nothing="NO REPORT"),
        number("GPUs that answer", "GPUs that NVML lists and that are not lost.", units.Short,
               "count by (instance) (gpu_doctor_gpu_lost{NODE} == 0)", nothing="NONE SEEN"),
        number("Essential sources unseen", "Of NVML, the kernel log, the engines' logs and pages: how many can't be seen. Their silence is no health.",
               units.Short, "sum by (instance) (instance:gpu_doctor_essential_unseen:sum{NODE})",
               steps=((1, "red"),), nothing="NO REPORT"),
        findings("Root causes", "What nothing else explains, worst first. The runbook says what to do; the node's own page shows the evidence.",
                 'root_cause="true",silenced="false"', width=24, height=7, nothing="No failure mode is present in what was seen"),
        findings("What follows from them", "Findings that a root cause explains: they go when it goes.",
                 'root_cause="false",silenced="false"', width=12, height=7, nothing="Nothing"),
        grid("GPUs concerned", "Which GPUs the findings are about, causes and consequences.",
             'max by (instance, gpu, uuid, failure_mode, root_cause) (gpu_doctor_finding{GPU,silenced="false",uuid!=""})',
             width=12, height=7, nothing="None", columns=(
                 ("instance", "node"), ("gpu", "GPU"), ("uuid", "UUID"), ("failure_mode", "failure mode"), ("root_cause", "root cause"))),
        grid("Could not be judged", "Failure modes that were not asked or not answered, and why: neither present nor absent.",
             'max by (instance, failure_mode, reason) (gpu_doctor_unjudged{NODE})', width=12, height=7, nothing="All were judged",
             columns=(("instance", "node"), ("failure_mode", "failure mode"), ("reason", "why"))),
        grid("Could not be seen", "Sources, or parts of them, that the last visit could not see, and why.",
             "sum by (instance, source, reason) (gpu_doctor_unseen{NODE})", width=12, height=7, nothing="All was seen",
             columns=(("instance", "node"), ("source", "source"), ("reason", "why"), ("Value", "parts"))),
        states("Findings over time", "Which failure modes were present when, by severity; notices and silenced ones too.",
               "max by (instance, failure_mode) (" + _weighed('silenced=~"true|false"') + ")",
               "{{instance}} {{failure_mode}}", SEVERITIES, width=24, nothing="None"),
    )),
    Row("Fleet", (
        lines("Nodes by verdict", "How many nodes have which verdict. One that is down or stale has none.", units.Short,
              ('sum by (verdict) (verdict:gpu_doctor_verdict:sum{job=~"$job"})', "{{verdict}}")),
        grid("Worst nodes", "The ten worst nodes that are not clear: 4 critical, 3 warning, 2 incomplete, 1 notice.",
             'topk(10, instance:gpu_doctor_verdict:rank{job=~"$job"} > 0)', nothing="All are clear", mapping=VERDICTS,
             columns=(("Value", "verdict"), ("instance", "node"))),
        grid("What is wrong on how many nodes", "Nodes by failure mode and severity.",
             'sort_desc(sum by (failure_mode, severity) (failure_mode:gpu_doctor_finding:count{job=~"$job"}))', nothing="Nothing",
             columns=(("Value", "nodes"), ("failure_mode", "failure mode"), ("severity", "severity"))),
        lines("GPUs: answering, and most within a day", "The distance is what was lost: GPUs, nodes, or the sight of them.", units.Short,
              ('sum(instance:gpu_doctor_gpus_answering:count{job=~"$job"})', "answering"),
              ('sum(instance:gpu_doctor_gpus_answering:max1d{job=~"$job"})', "most within a day")),
        lines("Nodes: targets, answering, with a fresh verdict", "Where they part, nodes are not watched.", units.Short,
              ('sum(job:gpu_doctor_targets:count{job=~"$job"})', "targets"),
              ('sum(up{job=~"$job"})', "answering"),
              ('count(instance:gpu_doctor_verdict:rank{job=~"$job"})', "with a verdict")),
        lines("Nodes that can't see something essential", "Their silence says little.", units.Short,
              ('sum(instance:gpu_doctor_essential_unseen:sum{job=~"$job"} > bool 0)', "nodes")),
    )),
    Row("Heat", (
        lines("GPU temperature", "Of the chip, and on older boards where the hardware slows the GPU down; newer ones tell the margin.", units.Celsius,
              ("gpu_doctor_gpu_temperature_celsius{GPU}", OF_GPU),
              ("min by (instance) (gpu_doctor_gpu_slowdown_temperature_celsius{GPU})", "{{instance}} slowdown"), least=None),
        lines("Memory temperature", "Of the memory, and on some boards the highest at which it may work.", units.Celsius,
              ("gpu_doctor_gpu_memory_temperature_celsius{GPU}", OF_GPU),
              ("min by (instance) (gpu_doctor_gpu_memory_temperature_max_celsius{GPU})", "{{instance}} highest allowed"), least=None),
        lines("Margin to the slowdown", "NVML's T.Limit: how far the hottest sensor is from the slowdown reference. At the lower line the hardware "
              "slows the GPU down.", units.Celsius,
              ("gpu_doctor_gpu_thermal_margin_celsius{GPU}", OF_GPU),
              ("max by (instance) (gpu_doctor_gpu_slowdown_margin_celsius{GPU})", "{{instance}} slowdown"), least=None),
    )),
    Row("Power", (
        lines("GPU power", "As the sensor averages it, and the limit that binds.", units.Watt,
              ("gpu_doctor_gpu_power_watts{GPU}", OF_GPU),
              ("min by (instance) (gpu_doctor_gpu_power_limit_enforced_watts{GPU})", "{{instance}} lowest limit")),
        lines("GPU power, highest sample", "The highest fast sample between two visits. Above the limit is normal for milliseconds.", units.Watt,
              ("gpu_doctor_gpu_power_peak_watts{GPU}", OF_GPU)),
        lines("Node power", "All GPUs together: at the visit, the highest common sample since the visit before, and their limits.", units.Watt,
              ("gpu_doctor_node_power_watts{NODE}", "{{instance}} now"),
              ("gpu_doctor_node_power_peak_watts{NODE}", "{{instance}} peak"),
              ("gpu_doctor_node_power_limit_watts{NODE}", "{{instance}} limits")),
        lines("Steps of the node's power", "Largest rise or fall of the common power within half a second: what power supplies feel.", units.Watt,
              ("gpu_doctor_node_power_step_watts{NODE}", OF_NODE)),
        lines("Energy", "Power from the energy counter, which forgets nothing between two scrapes.", units.Watt,
              ("rate(gpu_doctor_gpu_energy_joules_total{GPU}[$__rate_interval])", OF_GPU)),
        lines("Share of the limit", "How near the GPUs are to the limit that binds.", units.PercentUnit,
              ("gpu_doctor_gpu_power_watts{GPU} / gpu_doctor_gpu_power_limit_enforced_watts{GPU}", OF_GPU)),
    )),
    Row("Clocks, and what holds them", (
        lines("SM clock", "Of the multiprocessors, and the highest that they can do.", units.Hertz,
              ("gpu_doctor_gpu_sm_clock_hertz{GPU}", OF_GPU),
              ("max by (instance) (gpu_doctor_gpu_sm_clock_max_hertz{GPU})", "{{instance}} highest")),
        lines("Time under a reason", "Share of the time in which something held the clocks down, by reason. The power cap is normal under load; "
              "thermal slowdown and power brake are not.", units.PercentUnit,
              ("sum by (instance, gpu, reason) (rate(gpu_doctor_gpu_clocks_event_seconds_total{GPU}[$__rate_interval]))",
               OF_GPU + " {{reason}}"), most=1),
        states("Reasons now", "Which reasons held the clocks at the visits.", "gpu_doctor_gpu_clocks_event{GPU}",
               OF_GPU + " {{reason}}", ((0, "no", "green"), (1, "yes", "orange")), nothing="None"),
    )),
    Row("Work and memory of the GPUs", (
        lines("Busy", "Share of the time in which any kernel ran. A rank that waits in a collective is busy, too.", units.PercentUnit,
              ("gpu_doctor_gpu_busy_ratio{GPU}", OF_GPU), most=1),
        lines("Tensor cores", "Share of the time in which tensor cores worked (GPM, Hopper and newer).", units.PercentUnit,
              ("gpu_doctor_gpu_tensor_busy_ratio{GPU}", OF_GPU), most=1),
        lines("Memory bandwidth", "Share of the memory's bandwidth in use (GPM, Hopper and newer).", units.PercentUnit,
              ("gpu_doctor_gpu_memory_bandwidth_ratio{GPU}", OF_GPU), most=1),
        lines("Memory in use", "Share of the GPU's memory that is allocated.", units.PercentUnit,
              ("gpu_doctor_gpu_memory_used_bytes{GPU} / gpu_doctor_gpu_memory_bytes{GPU}", OF_GPU), most=1),
        lines("Memory errors", "Corrected and uncorrected ECC errors since the driver was loaded.", units.Short,
              ("gpu_doctor_gpu_ecc_errors_total{GPU}", OF_GPU + " {{kind}}")),
        grid("Xids", "What the driver complained of since the daemon began to count, by code; `gpu-doctor explain xid-79` tells what one means.",
             "sum by (instance, xid, pci_address) (gpu_doctor_xids_total{NODE})", nothing="None", columns=(
                 ("instance", "node"), ("xid", "Xid"), ("pci_address", "PCI address"), ("Value", "lines"))),
    )),
    Row("NVLink and PCI Express", (
        lines("NVLinks up", "Active links of each GPU.", units.Short,
              ("sum by (instance, gpu) (gpu_doctor_nvlink_up{GPU})", OF_GPU)),
        grid("NVLinks down", "Links that are not active.", "gpu_doctor_nvlink_up{GPU} == 0", nothing="None",
             columns=(("instance", "node"), ("gpu", "GPU"), ("link", "link"), ("uuid", "UUID"))),
        lines("NVLink errors", "Replays, recoveries and CRC errors a second, all links of a GPU together.", units.CountsPerSecond,
              ("sum by (instance, gpu, kind) (rate(gpu_doctor_nvlink_errors_total{GPU}[$__rate_interval]))", OF_GPU + " {{kind}}")),
        lines("NVLink traffic", "Sent and received (GPM, Hopper and newer).", units.BytesPerSecondSI,
              ("gpu_doctor_gpu_nvlink_transmit_bytes_per_second{GPU}", OF_GPU + " sent"),
              ("gpu_doctor_gpu_nvlink_receive_bytes_per_second{GPU}", OF_GPU + " received")),
        lines("PCI Express traffic", "Sent and received. Much of it under tensor parallelism means that NVLink is not used.", units.BytesPerSecondSI,
              ("gpu_doctor_gpu_pcie_transmit_bytes_per_second{GPU}", OF_GPU + " sent"),
              ("gpu_doctor_gpu_pcie_receive_bytes_per_second{GPU}", OF_GPU + " received")),
        lines("PCI Express link", "Lanes and generation now, as a share of what GPU and slot can do. Idle links go down in generation on purpose.",
              units.PercentUnit,
              ("gpu_doctor_gpu_pcie_lanes{GPU} / gpu_doctor_gpu_pcie_lanes_max{GPU}", OF_GPU + " lanes"),
              ("gpu_doctor_gpu_pcie_generation{GPU} / gpu_doctor_gpu_pcie_generation_max{GPU}", OF_GPU + " generation"), most=1),
    )),
    Row("The engine", (
        lines("Requests", "Running and waiting.", units.Short,
              ("gpu_doctor_engine_requests_running{NODE}", OF_ENGINE + " running"),
              ("gpu_doctor_engine_requests_waiting{NODE}", OF_ENGINE + " waiting")),
        lines("Tokens", "Generated, and read from prompts, a second.", units.Short,
              ("rate(gpu_doctor_engine_generation_tokens_total{NODE}[$__rate_interval])", OF_ENGINE + " generated"),
              ("rate(gpu_doctor_engine_prompt_tokens_total{NODE}[$__rate_interval])", OF_ENGINE + " read")),
        lines("Stall", "How long requests have run without a step. 0: it moves, or has nothing to do.", units.Seconds,
              ("gpu_doctor_engine_stall_seconds{NODE}", OF_ENGINE)),
        lines("KV cache in use", "Share of it. Near 1, requests wait or are put back.", units.PercentUnit,
              ("gpu_doctor_engine_kv_cache_usage_ratio{NODE}", OF_ENGINE), most=1),
        lines("Steps and preemptions", "Steps of the engine, and requests put back because the KV cache was full, a second.", units.CountsPerSecond,
              ("rate(gpu_doctor_engine_steps_total{NODE}[$__rate_interval])", OF_ENGINE + " steps"),
              ("rate(gpu_doctor_engine_preemptions_total{NODE}[$__rate_interval])", OF_ENGINE + " preemptions")),
        states("Workers", "Whether each rank is stopped, ended or hangs in the kernel.", "gpu_doctor_engine_rank_held{NODE}",
               OF_ENGINE + " rank {{rank}}", ((0, "runs", "green"), (1, "held", "red")), nothing="No engine"),
        grid("Which rank on which GPU", "Ranks and the GPUs that they run on.",
             "max by (instance, engine, rank, gpu, uuid) (gpu_doctor_engine_rank_info{GPU})", nothing="No engine", columns=(
                 ("instance", "node"), ("engine", "engine"), ("rank", "rank"), ("gpu", "GPU"), ("uuid", "UUID"))),
        grid("Engines and their versions", "What runs, with the versions in the engine's own environment.",
             "max by (instance, engine, model, version, torch, nccl, tensor_parallel_size) (gpu_doctor_engine_info{NODE})",
             nothing="No engine", columns=(
                 ("instance", "node"), ("engine", "engine"), ("model", "model"), ("version", "version"), ("torch", "PyTorch"),
                 ("nccl", "NCCL"), ("tensor_parallel_size", "TP"))),
        lines("Timeouts and OOM kills", "Lines of NCCL's watchdog, and processes that the kernel killed, since the daemon started.", units.Short,
              ("gpu_doctor_nccl_timeouts_total{NODE}", "{{instance}} NCCL timeouts"),
              ("gpu_doctor_oom_kills_total{NODE}", "{{instance}} OOM kills")),
    )),
    Row("gpu-doctor itself", (
        states("Collectors", "Whether each collector saw its source.", "gpu_doctor_collector_success{NODE}", "{{instance}} {{collector}}", YES_NO,
               nothing="NO REPORT"),
        lines("How long collectors take", "At the last visit.", units.Seconds,
              ("gpu_doctor_collector_duration_seconds{NODE}", "{{instance}} {{collector}}")),
        lines("Visits and their lag", "Visits a minute, and how much later than due the last report came.", units.Short,
              ("60 * rate(gpu_doctor_visits_total{NODE}[$__rate_interval])", "{{instance}} visits a minute"),
              ("gpu_doctor_loop_lag_seconds{NODE}", "{{instance}} lag in seconds")),
        lines("CPU", "Share of one core: the daemon, and its children together.", units.PercentUnit,
              ("rate(gpu_doctor_process_cpu_seconds_total{NODE}[$__rate_interval])", "{{instance}} {{process}}")),
        lines("Memory", "Resident; pages that daemon and children share count in both.", units.BytesIEC,
              ("gpu_doctor_process_resident_memory_bytes{NODE}", "{{instance}} {{process}}")),
        lines("Threads and descriptors", "Both are flat over months, or something leaks.", units.Short,
              ("gpu_doctor_process_threads{NODE}", "{{instance}} threads"),
              ("gpu_doctor_process_open_fds{NODE}", "{{instance}} descriptors")),
        lines("Clients", "Answers by status, refused logins and connections that were dropped, a second.", units.RequestsPerSecond,
              ("rate(gpu_doctor_http_responses_total{NODE}[$__rate_interval])", "{{instance}} {{code}}"),
              ("rate(gpu_doctor_http_logins_failed_total{NODE}[$__rate_interval])", "{{instance}} refused logins"),
              ("rate(gpu_doctor_http_connections_dropped_total{NODE}[$__rate_interval])", "{{instance}} {{reason}}")),
        lines("Flight recorder", "Visits that wait for the disk, and that were lost since the daemon started.", units.Short,
              ("gpu_doctor_recorder_waiting_visits{NODE}", "{{instance}} wait"),
              ("gpu_doctor_recorder_lost_visits_total{NODE}", "{{instance}} lost"), nothing="No recorder"),
        lines("Left out", "Samples that a page has no room for, and lines of engines' logs that were only counted, a second.", units.Short,
              ("gpu_doctor_series_left_out{NODE}", "{{instance}} samples"),
              ("rate(gpu_doctor_engine_log_lines_dropped_total{NODE}[$__rate_interval])", "{{instance}} lines")),
    )),
)  # fmt: skip
"""The dashboard from top to bottom."""


# As Grafana wants it -----------------------------------------------------------------------------------------------


def page() -> str:
    """Return the dashboard's file."""
    made = (
        dashboard.Dashboard("gpu-doctor")
        .uid("gpu-doctor")
        .description(
            "What is wrong with the GPU nodes, why, and what to do. Generated by `make docs` from docs/dashboard.py."
        )
        .tags(["gpu", "llm", "gpu-doctor"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .variables(list(_variables()))
    )
    number = 0
    for row in ROWS:
        number += 1
        made.with_row(dashboard.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            made.with_panel(_built(panel).id(number))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"


def _variables() -> Iterable[Any]:
    yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    for name, label, metric in (
        ("job", "job", "gpu_doctor_build_info"),
        ("instance", "node", 'gpu_doctor_build_info{job=~"$job"}'),
        ("gpu", "GPU", f"gpu_doctor_gpu_info{{{NODE}}}"),
    ):
        yield (
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query(f"label_values({metric}, {name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.NUMERICAL_ASC if name == "gpu" else models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
    yield dashboard.TextBoxVariable("runbooks").label("runbooks").default_value(RUNBOOKS)


def _built(panel: Panel) -> Any:
    """Return Grafana's builder of a panel."""
    made = {"lines": _lines, "number": _number, "table": _table, "states": _states}[panel.kind](panel)
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    made.span(panel.width).height(panel.height)
    if panel.nothing is not None:
        made.no_value(panel.nothing)
    for letter, query in zip("ABC", panel.queries, strict=False):
        asked = (
            prometheus.Dataquery()
            .expr(query.expression.replace("NODE", NODE).replace("GPU", GPU))
            .legend_format(query.legend)
            .ref_id(letter)
            .datasource(SOURCE)
        )
        if panel.kind == "table":
            asked.instant().format(PromQueryFormat.TABLE)
        elif panel.kind == "number":
            asked.instant()
        else:
            asked.range()
        made.with_target(asked)
    return made


def _lines(panel: Panel) -> Any:
    made = timeseries.Panel().fill_opacity(5).line_width(1).show_points(common.VisibilityMode.NEVER)
    made.tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    made.legend(legend.display_mode(common.LegendDisplayMode.LIST))
    if panel.least is not None:
        made.min(panel.least)
    if panel.most is not None:
        made.max(panel.most)
    return made


def _number(panel: Panel) -> Any:
    made = stat.Panel().text_mode(common.BigValueTextMode.VALUE_AND_NAME).graph_mode(common.BigValueGraphMode.NONE)
    made.color_mode(common.BigValueColorMode.BACKGROUND).mappings(_mappings(panel.mapping))
    steps = [
        models.Threshold(color="green"),
        *(models.Threshold(value=value, color=colour) for value, colour in panel.steps),
    ]
    made.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    return made.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))


def _states(panel: Panel) -> Any:
    return statetimeline.Panel().mappings(_mappings(panel.mapping)).show_value(common.VisibilityMode.NEVER)


def _table(panel: Panel) -> Any:
    """Return a table: its columns in their order, links where one can go on, and words where values are codes."""
    made = table.Panel().show_header(True)
    if len(panel.queries) > 1:
        made.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        worst_first = {"sort": [{"field": panel.columns[0][0], "desc": True}]}
        made.with_transformation(models.DataTransformerConfig(id_val="sortBy", options=worst_first))
    shown = [name for name, _ in panel.columns]
    hidden = {"Time": True} | ({} if any(name.startswith("Value") for name in shown) else {"Value": True})
    organized = {
        "excludeByName": hidden | {name: True for name in HIDDEN if name not in shown},
        "indexByName": {name: place for place, name in enumerate(shown)},
        "renameByName": dict(panel.columns),
    }
    made.with_transformation(models.DataTransformerConfig(id_val="organize", options=organized))
    for name, heading in panel.columns:
        if properties := list(_properties(name, panel)):
            made.override_by_name(heading, properties)
    return made


HIDDEN = ("__name__", "job", "verdict", "uuid", "gpu")
"""Labels that stand in no column, unless a panel says so."""


def _properties(column: str, panel: Panel) -> Iterable[models.DynamicConfigValue]:
    """Yield how a column looks, and where it leads."""
    if mapping := {"Value #A": SEVERITIES, "what": TITLES, "Value": panel.mapping}.get(column):
        yield models.DynamicConfigValue("mappings", _mappings(mapping))
        if column != "what":
            yield models.DynamicConfigValue("custom.cellOptions", {"type": "color-background"})
    if column == "instance":
        yield models.DynamicConfigValue(
            "links", [{"title": "The node's own page", "url": "http://${__value.text}/", "targetBlank": True}]
        )
    if column == "runbook":
        link = {"title": "Runbook", "url": "${runbooks}/${__value.text}.md", "targetBlank": True}
        yield models.DynamicConfigValue("links", [link])


def _mappings(mapping: Mapping) -> list[models.ValueMapping]:
    if not mapping:
        return []
    shown = {str(value): models.ValueMappingResult(text=text, color=colour) for value, text, colour in mapping}
    return [models.ValueMap(options=shown)]
