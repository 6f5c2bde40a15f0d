"""Spans to a real collector; and nothing at all, not even an import, where none is named."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve_app.doctor import Verdict, _tracing
from serve_app.settings import Settings
from serve_app.tracing import Stages, Tracing
from tests.otlp_receiver import OtlpReceiver

CLIENTS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_spans_of_two_processes_are_one_trace() -> None:
    with OtlpReceiver() as receiver:
        settings = Settings(data_dir=Path("x"), otlp_endpoint=receiver.url)
        ingress, conductor = Tracing.of(settings, "Ingress"), Tracing.of(settings, "Conductor")
        with ingress.span("submit", CLIENTS, {"job_type": "image_fast"}) as submit:
            pass
        stages = Stages(conductor, "job", submit.traceparent, at=time.time() - 5)
        stages.enter("queued", at=time.time() - 5)
        stages.enter("generating")
        inside = stages.traceparent
        stages.end(failed="no room", facts={"outcome": "failed"})
        stages.end(failed="once is enough")
        with pytest.raises(ValueError, match="broken"), ingress.span("encode", inside):
            raise ValueError("broken")
        ingress.close()
        conductor.close()
    spans = {span.name: span for span in receiver.spans}
    assert len(spans) == len(receiver.spans) == 5
    assert {span.trace_id for span in receiver.spans} == {CLIENTS.split("-")[1]}
    assert spans["submit"].parent_id == CLIENTS.split("-")[2]
    assert spans["job"].parent_id == spans["submit"].span_id
    assert spans["queued"].parent_id == spans["generating"].parent_id == spans["job"].span_id
    assert spans["encode"].parent_id == spans["generating"].span_id
    assert {name: spans[name].failed for name in spans} == {
        "submit": "", "queued": "", "job": "no room", "generating": "no room", "encode": "ValueError: broken",
    }  # fmt: skip
    assert (spans["submit"].part, spans["job"].part) == ("Ingress", "Conductor")
    assert spans["job"].attributes == {"wan_serve.outcome": "failed"}
    assert spans["queued"].end_ns - spans["queued"].start_ns == pytest.approx(5e9, rel=0.1)


def test_a_collector_that_is_away_costs_nothing_but_spans() -> None:
    tracing = Tracing.of(Settings(data_dir=Path("x"), otlp_endpoint="http://127.0.0.1:1"), "Ingress")
    with tracing.span("submit", None) as span:
        assert span.traceparent is not None
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < 6


def test_the_doctor_asks_the_collector() -> None:
    with OtlpReceiver() as receiver:
        takes = _tracing(Settings(data_dir=Path("x"), otlp_endpoint=receiver.url))
        wrong = _tracing(Settings(data_dir=Path("x"), otlp_endpoint=f"{receiver.url}/elsewhere"))
    away = _tracing(Settings(data_dir=Path("x"), otlp_endpoint="http://127.0.0.1:1"))
    assert takes.verdict == Verdict.OK
    assert wrong.verdict == away.verdict == Verdict.NOTE
    assert "404" in wrong.found


def test_where_it_is_off_opentelemetry_is_not_imported() -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from serve_app.settings import Settings
        from serve_app.tracing import Stages, Tracing
        tracing = Tracing.of(Settings(data_dir=Path("x")), "Ingress")
        with tracing.span("submit", None) as span:
            assert span.traceparent is None
        Stages(tracing, "job").enter("queued")
        tracing.close()
        assert not [name for name in sys.modules if name.startswith("opentelemetry")]
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
