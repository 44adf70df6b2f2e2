"""Run the work beside the calls: background jobs, reload, alert delivery, telemetry, doctor, explain, replay, reconcile."""
