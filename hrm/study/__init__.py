"""Many runs compared: campaigns, statistics, plots and pages."""
