// Package netns_test runs the built daemon as an operator would, on machines
// made of network and mount namespaces, with Debian's own SOCKS servers and
// untouched clients, and asserts what is seen at the far side.
//
// It promises to leave nothing behind: a machine has no name outside of this
// process, its namespaces end with the thread that holds them, and every
// process started in it dies with that thread, also when the test is killed.
// A missing privilege or Debian package is a failure that names it.
package netns_test
