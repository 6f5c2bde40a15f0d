"""The application graph, on one screen (DESIGN.md section 4).

client ── HTTP ──► Ingress ──► JobStore ◄── Conductor ──► Generator (GPU) ──► Finisher (CPU) ──► artifact store
                                                                                  ▲▼
                                                                               Upscaler (where it is configured)
"""

from ray.serve import Application

from deployments.conductor import Conductor
from deployments.embedded_store import Store
from deployments.finisher import Finisher
from deployments.generator import Generator
from deployments.ingress import Ingress
from deployments.upscaler import Upscaler
from serve_app.settings import Settings


def build(settings: Settings) -> Application:
    """The Serve application for `settings` (the `args` of a Serve YAML file). Replica counts, GPUs and autoscaling are
    given per deployment in that file."""
    generators = {
        model: Generator.options(name=settings.generator_name(model)).bind(settings, model) for model in settings.models
    }
    upscaler = Upscaler.bind(settings) if settings.upscale_model else None
    finisher = Finisher.bind(settings, upscaler)
    conductor = Conductor.bind(settings, generators, finisher)
    store = Store.bind(settings) if settings.store_url is None else None
    return Ingress.bind(settings, conductor, store)
