"""For all tests."""

from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair: a busy one must fail no test.
settings.register_profile("quark", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("quark")
