"""Looking into a trained model: what is measured, what the measurements say, and the page that shows it."""
