//go:build race

package relay

// raceDetector tells that memory cannot be measured.
const raceDetector = true
